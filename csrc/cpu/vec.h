// One vector of 16 floats, for whichever instruction set this file is built for.
//
// Every kernel source is compiled once per target (see setup.py), with
//   LIPFAST_TARGET   0 plain C++, 1 AVX2 + FMA, 2 AVX-512
//   LIPFAST_NS       plain, avx2, avx512: the namespace of everything built so
// so equal names never collide at link time. Kernels use no std:: templates:
// a weak symbol compiled with wide instructions could otherwise be picked for
// a machine without them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if LIPFAST_TARGET > 0
#include <immintrin.h>
#endif

#define LIPFAST_UNROLL _Pragma("GCC unroll 32")

namespace lipfast {
namespace LIPFAST_NS {

constexpr int kLanes = 16;

#if LIPFAST_TARGET == 2

constexpr int kRegisters = 32;  // vectors of 16 that the register file holds
constexpr int kParts = 1;       // registers that a vector takes
using V = __m512;

static inline V Load(const float* p) { return _mm512_load_ps(p); }
static inline V LoadU(const float* p) { return _mm512_loadu_ps(p); }
static inline void Store(float* p, V v) { _mm512_store_ps(p, v); }
static inline void StoreU(float* p, V v) { _mm512_storeu_ps(p, v); }
static inline V Set(float x) { return _mm512_set1_ps(x); }
static inline V Zero() { return _mm512_setzero_ps(); }
static inline V Add(V a, V b) { return _mm512_add_ps(a, b); }
static inline V Sub(V a, V b) { return _mm512_sub_ps(a, b); }
static inline V Mul(V a, V b) { return _mm512_mul_ps(a, b); }
static inline V Div(V a, V b) { return _mm512_div_ps(a, b); }
static inline V Max(V a, V b) { return _mm512_max_ps(a, b); }
static inline V Min(V a, V b) { return _mm512_min_ps(a, b); }
static inline V Sqrt(V a) { return _mm512_sqrt_ps(a); }
// a * b + c, rounded once.
static inline V Fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
// a > 0 ? b : c, lane by lane.
static inline V IfPositive(V a, V b, V c) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ), c, b);
}
// a > b, or a is NaN ? c : d, lane by lane.
static inline V IfLarger(V a, V b, V c, V d) {
  const auto larger = _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) | _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_mask_blend_ps(static_cast<__mmask16>(larger), d, c);
}
// To a whole number, ties to even; up to 2^22.
static inline V Round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
// x * 2^n for whole n from -126 to 127; inf for 128.
static inline V TimesPowerOfTwo(V x, V n) { return _mm512_scalef_ps(x, n); }
// A register's worth of lanes, for loops in which whole vectors would not fit the registers.
using R = V;
static inline R LoadR(const float* p) { return Load(p); }
static inline R SetR(float x) { return Set(x); }

#elif LIPFAST_TARGET == 1

constexpr int kRegisters = 8;
constexpr int kParts = 2;
struct V {
  __m256 a, b;
};

static inline V Load(const float* p) { return {_mm256_load_ps(p), _mm256_load_ps(p + 8)}; }
static inline V LoadU(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void Store(float* p, V v) {
  _mm256_store_ps(p, v.a);
  _mm256_store_ps(p + 8, v.b);
}
static inline void StoreU(float* p, V v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
static inline V Set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline V Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
#define LIPFAST_BINARY(Name, op) \
  static inline V Name(V x, V y) { return {_mm256_##op##_ps(x.a, y.a), _mm256_##op##_ps(x.b, y.b)}; }
LIPFAST_BINARY(Add, add)
LIPFAST_BINARY(Sub, sub)
LIPFAST_BINARY(Mul, mul)
LIPFAST_BINARY(Div, div)
LIPFAST_BINARY(Max, max)
LIPFAST_BINARY(Min, min)
#undef LIPFAST_BINARY
static inline V Sqrt(V x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
static inline V Fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline V IfPositive(V x, V y, V z) {
  const __m256 zero = _mm256_setzero_ps();
  return {_mm256_blendv_ps(z.a, y.a, _mm256_cmp_ps(x.a, zero, _CMP_GT_OQ)),
          _mm256_blendv_ps(z.b, y.b, _mm256_cmp_ps(x.b, zero, _CMP_GT_OQ))};
}
static inline __m256 IfLarger(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 larger = _mm256_or_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_ps(d, c, larger);
}
static inline V IfLarger(V a, V b, V c, V d) { return {IfLarger(a.a, b.a, c.a, d.a), IfLarger(a.b, b.b, c.b, d.b)}; }
static inline V Round(V x) {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT), _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT)};
}
static inline __m256 PowerOfTwo(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline V TimesPowerOfTwo(V x, V n) { return Mul(x, {PowerOfTwo(n.a), PowerOfTwo(n.b)}); }
using R = __m256;
static inline R LoadR(const float* p) { return _mm256_load_ps(p); }
static inline R SetR(float x) { return _mm256_set1_ps(x); }
static inline void Store(float* p, R v) { _mm256_store_ps(p, v); }
static inline R Add(R a, R b) { return _mm256_add_ps(a, b); }
static inline R Sub(R a, R b) { return _mm256_sub_ps(a, b); }
static inline R Mul(R a, R b) { return _mm256_mul_ps(a, b); }
static inline R Fma(R a, R b, R c) { return _mm256_fmadd_ps(a, b, c); }

#else

constexpr int kRegisters = 4;
constexpr int kParts = 4;
// 128 bits, which most machines have; the compiler finds the instructions.
typedef float R __attribute__((vector_size(16), may_alias));
typedef float UnalignedR __attribute__((vector_size(16), may_alias, aligned(4)));
struct V {
  R a, b, c, d;
};

static inline R LoadR(const float* p) { return *reinterpret_cast<const R*>(p); }
static inline R SetR(float x) { return R{x, x, x, x}; }
static inline void Store(float* p, R v) { *reinterpret_cast<R*>(p) = v; }
static inline R Add(R a, R b) { return a + b; }
static inline R Sub(R a, R b) { return a - b; }
static inline R Mul(R a, R b) { return a * b; }
static inline R Div(R a, R b) { return a / b; }
static inline R Max(R a, R b) { return a > b ? a : b; }
static inline R Min(R a, R b) { return a < b ? a : b; }
// Two roundings here: a machine without FMA would emulate the single one slowly.
static inline R Fma(R a, R b, R c) { return a * b + c; }
static inline R IfPositive(R a, R b, R c) { return a > 0.0f ? b : c; }
static inline R IfLarger(R a, R b, R c, R d) { return (a > b) | (a != a) ? c : d; }
static inline R PowerOfTwo(R n) {
  typedef int32_t Whole __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  return reinterpret_cast<R>((reinterpret_cast<Bits>(__builtin_convertvector(n, Whole)) + 127) << 23);
}
static inline R Sqrt(R x) { return R{std::sqrt(x[0]), std::sqrt(x[1]), std::sqrt(x[2]), std::sqrt(x[3])}; }

static inline V Load(const float* p) { return {LoadR(p), LoadR(p + 4), LoadR(p + 8), LoadR(p + 12)}; }
static inline V LoadU(const float* p) {
  const UnalignedR* parts = reinterpret_cast<const UnalignedR*>(p);
  return {parts[0], parts[1], parts[2], parts[3]};
}
static inline void Store(float* p, V v) {
  Store(p, v.a);
  Store(p + 4, v.b);
  Store(p + 8, v.c);
  Store(p + 12, v.d);
}
static inline void StoreU(float* p, V v) {
  UnalignedR* parts = reinterpret_cast<UnalignedR*>(p);
  parts[0] = v.a;
  parts[1] = v.b;
  parts[2] = v.c;
  parts[3] = v.d;
}
static inline V Set(float x) { return {SetR(x), SetR(x), SetR(x), SetR(x)}; }
static inline V Zero() { return Set(0.0f); }
static inline V Sqrt(V x) { return {Sqrt(x.a), Sqrt(x.b), Sqrt(x.c), Sqrt(x.d)}; }
#define LIPFAST_BINARY(Name) \
  static inline V Name(V x, V y) { return {Name(x.a, y.a), Name(x.b, y.b), Name(x.c, y.c), Name(x.d, y.d)}; }
LIPFAST_BINARY(Add)
LIPFAST_BINARY(Sub)
LIPFAST_BINARY(Mul)
LIPFAST_BINARY(Div)
LIPFAST_BINARY(Max)
LIPFAST_BINARY(Min)
#undef LIPFAST_BINARY
static inline V Round(V x) {
  const V magic = Set(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  return Sub(Add(x, magic), magic);
}
static inline V TimesPowerOfTwo(V x, V n) {
  return Mul(x, {PowerOfTwo(n.a), PowerOfTwo(n.b), PowerOfTwo(n.c), PowerOfTwo(n.d)});
}
#define LIPFAST_TERNARY(Name)                                                                    \
  static inline V Name(V x, V y, V z) {                                                          \
    return {Name(x.a, y.a, z.a), Name(x.b, y.b, z.b), Name(x.c, y.c, z.c), Name(x.d, y.d, z.d)}; \
  }
LIPFAST_TERNARY(Fma)
LIPFAST_TERNARY(IfPositive)
#undef LIPFAST_TERNARY
static inline V IfLarger(V a, V b, V c, V d) {
  return {IfLarger(a.a, b.a, c.a, d.a), IfLarger(a.b, b.b, c.b, d.b), IfLarger(a.c, b.c, c.c, d.c),
          IfLarger(a.d, b.d, c.d, d.d)};
}

#endif

constexpr int kRegisterLanes = sizeof(R) / sizeof(float);

// Sum of the 16 lanes, always in the same order: halves are added to halves.
#if LIPFAST_TARGET > 0
static inline float SumEight(__m256 eight) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#endif
#if LIPFAST_TARGET == 2
static inline float Sum(V x) {
  return SumEight(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}
#elif LIPFAST_TARGET == 1
static inline float Sum(V x) { return SumEight(_mm256_add_ps(x.a, x.b)); }
static inline float Sum(R x) { return SumEight(x); }
#else
static inline float Sum(R x) { return (x[0] + x[2]) + (x[1] + x[3]); }
static inline float Sum(V x) { return Sum((x.a + x.c) + (x.b + x.d)); }
#endif

// Sums of many vectors are taken sixteen at a time: StoreFolded puts a vector down, added up as
// far as costs nothing, in kFolded floats; lane i of SumEach is the sum of the i-th of sixteen.
#if LIPFAST_TARGET == 2
constexpr int kFolded = kLanes / 2;
static inline void StoreFolded(float* p, V x) {
  _mm256_store_ps(p, _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}
static inline V SumEach(const float* folded) {
  // Each step adds halves and brings the sums of two vectors together in one; a vector is two of the sixteen.
  V pairs[4], fours[2];
  LIPFAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const V a = Load(folded + i * kLanes), b = Load(folded + (i + 4) * kLanes);
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  LIPFAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    fours[i] = _mm512_add_ps(_mm512_unpacklo_ps(pairs[i], pairs[i + 2]), _mm512_unpackhi_ps(pairs[i], pairs[i + 2]));
  }
  const V sums =
      _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88), _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), sums);
}
#elif LIPFAST_TARGET == 1
constexpr int kFolded = kLanes / 2;
static inline void StoreFolded(float* p, V x) { _mm256_store_ps(p, _mm256_add_ps(x.a, x.b)); }
static inline __m256 SumEightEach(const float* folded) {
  __m256 pairs[4], fours[2];
  LIPFAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m256 a = _mm256_load_ps(folded + 2 * i * kFolded), b = _mm256_load_ps(folded + (2 * i + 1) * kFolded);
    pairs[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  LIPFAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    fours[i] = _mm256_add_ps(_mm256_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0x44),
                             _mm256_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0xee));
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                       _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
}
static inline V SumEach(const float* folded) { return {SumEightEach(folded), SumEightEach(folded + 8 * kFolded)}; }
#else
constexpr int kFolded = 1;
static inline void StoreFolded(float* p, V x) { *p = Sum(x); }
static inline V SumEach(const float* folded) { return Load(folded); }
#endif

// The first n floats at p, zeros behind them; reads nothing past p + n.
static inline V LoadPart(const float* p, int n) {
#if LIPFAST_TARGET == 2
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  if (n == kLanes) return LoadU(p);
  alignas(64) float t[kLanes] = {};
  std::memcpy(t, p, sizeof(float) * n);
  return Load(t);
#endif
}

// Writes the first n lanes to p and nothing else.
static inline void StorePart(float* p, V x, int n) {
#if LIPFAST_TARGET == 2
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x);
#else
  if (n == kLanes) {
    StoreU(p, x);
    return;
  }
  alignas(64) float t[kLanes];
  Store(t, x);
  std::memcpy(p, t, sizeof(float) * n);
#endif
}

// The floats at p where live is -1, zeros where it is 0; reads no others.
static inline V LoadLive(const float* p, const int32_t (&live)[kLanes]) {
#if LIPFAST_TARGET == 2
  return _mm512_maskz_loadu_ps(_mm512_movepi32_mask(_mm512_loadu_si512(live)), p);
#elif LIPFAST_TARGET == 1
  const __m256i* halves = reinterpret_cast<const __m256i*>(live);
  return {_mm256_maskload_ps(p, _mm256_loadu_si256(halves)), _mm256_maskload_ps(p + 8, _mm256_loadu_si256(halves + 1))};
#else
  alignas(64) float t[kLanes] = {};
  for (int i = 0; i < kLanes; ++i) {
    if (live[i]) t[i] = p[i];
  }
  return Load(t);
#endif
}

// Stores a vector, or adds it to what is there.
static inline void Put(float* p, V x, bool accumulate) { Store(p, accumulate ? Add(Load(p), x) : x); }

static inline void Prefetch(const float* p) { __builtin_prefetch(p, 0, 3); }
// To the second cache level only.
static inline void PrefetchFar(const float* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace LIPFAST_NS
}  // namespace lipfast
