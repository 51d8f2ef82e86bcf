// The AVX-512 intrinsics that the kernels use, made of AVX2: the same bits, slower. For CPUs and tools (valgrind) that
// know no AVX-512. `build.py --emulate-avx512` includes it before everything else.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace emulated {

constexpr int kCount = 16;
using Mask = uint16_t;

inline __m512 Join(__m256 low, __m256 high) {
  __m512 x;
  std::memcpy(&x, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&x) + sizeof low, &high, sizeof high);
  return x;
}
inline __m256 Half(__m512 x, int i) {
  __m256 half;
  std::memcpy(&half, reinterpret_cast<const char*>(&x) + i * sizeof half, sizeof half);
  return half;
}

// Lane by lane: f(i) is lane i.
template <class Vector, class Lane, class F>
inline Vector Each(const F& f) {
  alignas(64) Lane lanes[sizeof(Vector) / sizeof(Lane)];
  for (size_t i = 0; i < sizeof(Vector) / sizeof(Lane); ++i) lanes[i] = f(i);
  Vector x;
  std::memcpy(&x, lanes, sizeof x);
  return x;
}
template <class Lane, class Vector>
inline Lane At(const Vector& x, size_t i) {
  Lane lane;
  std::memcpy(&lane, reinterpret_cast<const char*>(&x) + i * sizeof lane, sizeof lane);
  return lane;
}
template <class F>
inline __m512 Floats(const F& f) {
  return Each<__m512, float>(f);
}
template <class F>
inline Mask Bits(const F& f) {
  Mask mask = 0;
  for (int i = 0; i < kCount; ++i) mask = static_cast<Mask>(mask | (f(i) ? 1u << i : 0u));
  return mask;
}
inline float F(__m512 x, size_t i) { return At<float>(x, i); }
inline int32_t I(__m512i x, size_t i) { return At<int32_t>(x, i); }

template <class Vector>
inline Vector Load(const void* p) {
  Vector x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
// Aligned accesses stop at an address that the instruction would refuse.
inline void Aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
}
inline __m512 LoadAligned(const float* p) {
  Aligned(p);
  return Load<__m512>(p);
}
template <class Vector>
inline void Store(void* p, Vector x) {
  std::memcpy(p, &x, sizeof x);
}
inline void StoreAligned(float* p, __m512 x) {
  Aligned(p);
  Store(p, x);
}

// Reads and writes live lanes only, as the instructions do.
inline __m512 LoadMasked(Mask mask, const float* p) {
  return Floats([&](size_t i) { return mask >> i & 1 ? p[i] : 0.0f; });
}
inline void StoreMasked(float* p, Mask mask, __m512 x) {
  for (int i = 0; i < kCount; ++i) {
    if (mask >> i & 1) p[i] = F(x, i);
  }
}

inline __m512 Fma(__m512 a, __m512 b, __m512 c) {
  return Join(_mm256_fmadd_ps(Half(a, 0), Half(b, 0), Half(c, 0)), _mm256_fmadd_ps(Half(a, 1), Half(b, 1), Half(c, 1)));
}
inline __m512 Max(__m512 a, __m512 b) {
  return Join(_mm256_max_ps(Half(a, 0), Half(b, 0)), _mm256_max_ps(Half(a, 1), Half(b, 1)));
}
inline __m512 Min(__m512 a, __m512 b) {
  return Join(_mm256_min_ps(Half(a, 0), Half(b, 0)), _mm256_min_ps(Half(a, 1), Half(b, 1)));
}
inline __m512 Sqrt(__m512 a) { return Join(_mm256_sqrt_ps(Half(a, 0)), _mm256_sqrt_ps(Half(a, 1))); }
inline __m512 Round(__m512 a) {
  return Join(_mm256_round_ps(Half(a, 0), _MM_FROUND_TO_NEAREST_INT),
              _mm256_round_ps(Half(a, 1), _MM_FROUND_TO_NEAREST_INT));
}
inline __m512 Scale(__m512 x, __m512 n) {
  return Floats([&](size_t i) {
    const float by = F(n, i);
    return by == by ? std::ldexp(F(x, i), static_cast<int>(by)) : by;
  });
}
inline __m512 UnpackLow(__m512 a, __m512 b) {
  return Join(_mm256_unpacklo_ps(Half(a, 0), Half(b, 0)), _mm256_unpacklo_ps(Half(a, 1), Half(b, 1)));
}
inline __m512 UnpackHigh(__m512 a, __m512 b) {
  return Join(_mm256_unpackhi_ps(Half(a, 0), Half(b, 0)), _mm256_unpackhi_ps(Half(a, 1), Half(b, 1)));
}
// Of each 128 bits of two vectors, double number `which` of both.
inline __m512d Unpack(__m512d a, __m512d b, size_t which) {
  return Each<__m512d, double>([&](size_t i) { return At<double>(i % 2 ? b : a, i / 2 * 2 + which); });
}
inline __m512 ShuffleQuarters(__m512 a, __m512 b, int order) {
  return Floats([&](size_t i) {
    const size_t quarter = order >> (2 * (i / 4)) & 3;
    return F(i < 8 ? a : b, quarter * 4 + i % 4);
  });
}
inline __m512 InsertQuarter(__m512 a, __m128 b, size_t at) {
  return Floats([&](size_t i) { return i / 4 == at ? At<float>(b, i % 4) : F(a, i); });
}
inline __m512 PermuteMasked(__m512 from, Mask mask, __m512i lane, __m512 a) {
  return Floats([&](size_t i) { return mask >> i & 1 ? F(a, I(lane, i) & 15) : F(from, i); });
}
inline __m512 Select(Mask mask, __m512 no, __m512 yes) {
  return Floats([&](size_t i) { return F(mask >> i & 1 ? yes : no, i); });
}
template <class Vector, class Lane>
inline Vector Compress(Mask mask, Vector x) {
  size_t from = 0;
  return Each<Vector, Lane>([&](size_t) {
    while (from < kCount && !(mask >> from & 1)) ++from;
    return from < kCount ? At<Lane>(x, from++) : Lane(0);
  });
}
inline __m512 Expand(Mask mask, __m512 x) {
  size_t from = 0;
  return Floats([&](size_t i) { return mask >> i & 1 ? F(x, from++) : 0.0f; });
}

inline Mask TestBytes(__m128i a, __m128i b) {
  return Bits([&](size_t i) { return (At<int8_t>(a, i) & At<int8_t>(b, i)) != 0; });
}
inline __m128i SetBytes(Mask mask, int8_t x) {
  return Each<__m128i, int8_t>([&](size_t i) { return mask >> i & 1 ? x : int8_t(0); });
}

}  // namespace emulated

#define _mm512_load_ps emulated::LoadAligned
#define _mm512_loadu_ps emulated::Load<__m512>
#define _mm512_store_ps emulated::StoreAligned
#define _mm512_storeu_ps(p, x) emulated::Store<__m512>(p, x)
#define _mm512_loadu_si512 emulated::Load<__m512i>
#define _mm512_storeu_si512(p, x) emulated::Store<__m512i>(p, x)
#define _mm512_maskz_loadu_ps emulated::LoadMasked
#define _mm512_mask_storeu_ps emulated::StoreMasked
#define _mm512_set1_ps(x) emulated::Floats([&](size_t) { return x; })
#define _mm512_setzero_ps() (__m512{})
#define _mm512_set1_epi32(x) (emulated::Each<__m512i, int32_t>([&](size_t) { return x; }))
#undef _mm512_setr_epi32  // a macro in some compilers
#define _mm512_setr_epi32(...) \
  (emulated::Each<__m512i, int32_t>([](size_t i) { return std::initializer_list<int32_t>{__VA_ARGS__}.begin()[i]; }))
#define _mm512_add_ps(a, b) ((a) + (b))
#define _mm512_sub_ps(a, b) ((a) - (b))
#define _mm512_mul_ps(a, b) ((a) * (b))
#define _mm512_div_ps(a, b) ((a) / (b))
#define _mm512_and_si512(a, b) ((a) & (b))
#define _mm512_fmadd_ps emulated::Fma
#define _mm512_max_ps emulated::Max
#define _mm512_min_ps emulated::Min
#define _mm512_sqrt_ps emulated::Sqrt
#define _mm512_roundscale_ps(x, how) emulated::Round(x)
#define _mm512_scalef_ps emulated::Scale
#define _mm512_unpacklo_ps emulated::UnpackLow
#define _mm512_unpackhi_ps emulated::UnpackHigh
#define _mm512_unpacklo_pd(a, b) emulated::Unpack(a, b, 0)
#define _mm512_unpackhi_pd(a, b) emulated::Unpack(a, b, 1)
#define _mm512_shuffle_f32x4 emulated::ShuffleQuarters
#define _mm512_insertf32x4 emulated::InsertQuarter
#define _mm512_extractf32x8_ps emulated::Half
#define _mm512_permutexvar_ps(lane, a) emulated::PermuteMasked(a, 0xffff, lane, a)
#define _mm512_mask_permutexvar_ps emulated::PermuteMasked
#define _mm512_mask_blend_ps emulated::Select
#define _mm512_maskz_mov_ps(mask, x) emulated::Select(mask, __m512{}, x)
#define _mm512_mask_mov_epi32(from, mask, x) \
  (emulated::Each<__m512i, int32_t>([&, mask_ = mask](size_t i) { return emulated::I(mask_ >> i & 1 ? x : from, i); }))
#define _mm512_maskz_compress_ps emulated::Compress<__m512, float>
#define _mm512_maskz_compress_epi32 emulated::Compress<__m512i, int32_t>
#define _mm512_maskz_expand_ps emulated::Expand
#define _mm512_movepi32_mask(x) emulated::Bits([&, x_ = x](size_t i) { return emulated::I(x_, i) < 0; })
#define _mm512_cmplt_epi32_mask(a, b) \
  emulated::Bits([&, a_ = a, b_ = b](size_t i) { return emulated::I(a_, i) < emulated::I(b_, i); })
#define _mm512_cmp_ps_mask(a, b, how)                           \
  emulated::Bits([&, a_ = a, b_ = b](size_t i) {                \
    const float x = emulated::F(a_, i), y = emulated::F(b_, i); \
    return (how) == _CMP_UNORD_Q ? x != x || y != y : x > y;    \
  })
#define _mm512_castps_pd(x) reinterpret_cast<__m512d>(x)
#define _mm512_castpd_ps(x) reinterpret_cast<__m512>(x)
#define _mm512_castps_si512(x) reinterpret_cast<__m512i>(x)
#define _mm512_castps512_ps256(x) emulated::Half(x, 0)
#define _mm512_castps128_ps512(x) emulated::InsertQuarter(__m512{}, x, 0)
#define _mm_test_epi8_mask emulated::TestBytes
#define _mm_maskz_set1_epi8 emulated::SetBytes
