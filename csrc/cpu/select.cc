#include "cpu/select.h"

#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

// One bit for each of 16 weights.
using Bits = uint32_t;

#if LIPFAST_TARGET == 2

using Keys = __m512i;

Bits FromBytes(const uint8_t* bytes) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return _mm_test_epi8_mask(x, x);
}
void ToBytes(Bits bits, uint8_t* bytes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm_maskz_set1_epi8(static_cast<__mmask16>(bits), 1));
}
Keys KeysOf(V score, Bits alive) {
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(score), _mm512_set1_epi32(0x7fffffff));
  return _mm512_mask_mov_epi32(_mm512_set1_epi32(kDeadKey), static_cast<__mmask16>(alive), magnitude);
}
Bits Less(Keys keys, int32_t bound) { return _mm512_cmplt_epi32_mask(keys, _mm512_set1_epi32(bound)); }
V Only(V x, Bits bits) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x); }
V Compress(V x, Bits bits) { return _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), x); }
V Expand(V x, Bits bits) { return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), x); }
void StoreChosen(int32_t* to, Keys keys, Bits bits) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), keys));
}

#else

#if LIPFAST_TARGET == 1

struct Keys {
  __m256i a, b;
};

Bits FromBytes(const uint8_t* bytes) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return static_cast<Bits>(~_mm_movemask_epi8(_mm_cmpeq_epi8(x, _mm_setzero_si128())) & 0xffff);
}
// Lane i of the result is all ones where bit i is set.
__m256i Widen(Bits bits) {
  const __m256i powers = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), powers), powers);
}
__m256i KeysOf8(__m256 score, Bits alive) {
  const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(score), _mm256_set1_epi32(0x7fffffff));
  return _mm256_blendv_epi8(_mm256_set1_epi32(kDeadKey), magnitude, Widen(alive));
}
Keys KeysOf(V score, Bits alive) { return {KeysOf8(score.a, alive), KeysOf8(score.b, alive >> 8)}; }
Bits Less(Keys keys, int32_t bound) {
  const __m256i x = _mm256_set1_epi32(bound);
  const int low = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(x, keys.a)));
  const int high = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(x, keys.b)));
  return static_cast<Bits>(low | high << 8);
}
V Only(V x, Bits bits) {
  return {_mm256_and_ps(x.a, _mm256_castsi256_ps(Widen(bits))),
          _mm256_and_ps(x.b, _mm256_castsi256_ps(Widen(bits >> 8)))};
}

#else

struct Keys {
  int32_t v[kLanes];
};

Bits FromBytes(const uint8_t* bytes) {
  Bits bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<Bits>(bytes[i] != 0) << i;
  return bits;
}
Keys KeysOf(V score, Bits alive) {
  Keys keys;
  std::memcpy(keys.v, &score, sizeof(keys.v));
  for (int i = 0; i < kLanes; ++i) keys.v[i] = alive >> i & 1 ? keys.v[i] & 0x7fffffff : kDeadKey;
  return keys;
}
Bits Less(Keys keys, int32_t bound) {
  Bits bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<Bits>(keys.v[i] < bound) << i;
  return bits;
}
V Only(V x, Bits bits) {
  alignas(64) float lanes[kLanes];
  Store(lanes, x);
  for (int i = 0; i < kLanes; ++i) lanes[i] = bits >> i & 1 ? lanes[i] : 0.0f;
  return Load(lanes);
}

#endif  // LIPFAST_TARGET == 1

void ToBytes(Bits bits, uint8_t* bytes) {
  for (int i = 0; i < kLanes; ++i) bytes[i] = bits >> i & 1;
}
V Compress(V x, Bits bits) {
  alignas(64) float from[kLanes], to[kLanes] = {};
  Store(from, x);
  for (int count = 0; bits; bits &= bits - 1) to[count++] = from[__builtin_ctz(bits)];
  return Load(to);
}
V Expand(V x, Bits bits) {
  alignas(64) float from[kLanes], to[kLanes] = {};
  Store(from, x);
  for (int count = 0; bits; bits &= bits - 1) to[__builtin_ctz(bits)] = from[count++];
  return Load(to);
}
void StoreChosen(int32_t* to, Keys keys, Bits bits) {
  int32_t from[kLanes];
  std::memcpy(from, &keys, sizeof(from));
  for (; bits; bits &= bits - 1) *to++ = from[__builtin_ctz(bits)];
}

#endif  // LIPFAST_TARGET == 2

int CountOf(Bits bits) { return __builtin_popcount(bits); }

int VectorAt(int64_t i, int64_t n) { return n - i < kLanes ? static_cast<int>(n - i) : kLanes; }

V ReadPart(const float* p, int count) { return count == kLanes ? LoadU(p) : LoadPart(p, count); }

void WritePart(float* p, V x, int count) {
  if (count == kLanes) {
    StoreU(p, x);
  } else {
    StorePart(p, x, count);
  }
}

Bits ReadBits(const uint8_t* bytes, int count) {
  if (count == kLanes) return FromBytes(bytes);
  uint8_t padded[kLanes] = {};
  std::memcpy(padded, bytes, count);
  return FromBytes(padded);
}

void WriteBytes(Bits bits, uint8_t* bytes, int count) {
  uint8_t padded[kLanes];
  ToBytes(bits, count == kLanes ? bytes : padded);
  if (count < kLanes) std::memcpy(bytes, padded, count);
}

KeyCounts Collect(const float* score, const uint8_t* alive, int64_t n, int32_t low, int32_t high, int32_t* candidates) {
  KeyCounts counts = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const int width = VectorAt(i, n);
    const Bits living = ReadBits(alive + i, width);
    const Keys keys = KeysOf(ReadPart(score + i, width), living);
    const Bits below = Less(keys, low);
    const Bits chosen = Less(keys, high + 1) & ~below;
    counts.living += CountOf(living);
    counts.below += CountOf(below);
    counts.nan |= (living & ~Less(keys, kInfinityKey + 1)) != 0;
    if (chosen) {
      StoreChosen(candidates + counts.candidates, keys, chosen);
      counts.candidates += CountOf(chosen);
    }
  }
  return counts;
}

// Those of `equal` that die, the lowest first, and what is then left of `ties`.
Bits TakeTies(Bits equal, int64_t* ties) {
  Bits dying = 0;
  for (; equal && *ties > 0; equal &= equal - 1, --*ties) dying |= equal & -equal;
  return dying;
}

void Write(const float* score, const uint8_t* alive, int64_t n, int32_t cut, int64_t ties, const PrunedRun& to) {
  int64_t packed = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int width = VectorAt(i, n);
    const Bits living = ReadBits(alive + i, width);
    const Keys keys = KeysOf(ReadPart(score + i, width), living);
    Bits dying = Less(keys, cut);
    if (ties > 0) dying |= TakeTies(Less(keys, cut + 1) & ~dying, &ties);
    const Bits kept = living & ~dying;
    if (to.mask) WriteBytes(kept, to.mask + i, width);
    if (to.bits) {
      to.bits[i / 8] = static_cast<uint8_t>(kept);
      if (width > 8) to.bits[i / 8 + 1] = static_cast<uint8_t>(kept >> 8);
    }
    if (!to.start) continue;
    const V start = ReadPart(to.start + i, width);
    if (to.dense) WritePart(to.dense + i, Only(start, kept), width);
    if (to.values) {
      // A whole vector where the run's own values follow, so that nobody else's are touched.
      const bool whole = packed + kLanes <= to.kept;
      WritePart(to.values + packed, Compress(start, kept), whole ? kLanes : CountOf(kept));
      packed += CountOf(kept);
    }
  }
}

int64_t Count(const uint8_t* mask, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) count += CountOf(ReadBits(mask + i, VectorAt(i, n)));
  return count;
}

void Scatter(const float* values, int64_t kept, const uint8_t* mask, int64_t n, float* dense) {
  int64_t used = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int width = VectorAt(i, n);
    const Bits living = ReadBits(mask + i, width);
    const bool whole = used + kLanes <= kept;
    WritePart(dense + i, Expand(ReadPart(values + used, whole ? kLanes : CountOf(living)), living), width);
    used += CountOf(living);
  }
}

}  // namespace

extern const SelectKernels select_kernels;
const SelectKernels select_kernels = {Collect, Write, Count, Scatter};

}  // namespace LIPFAST_NS
}  // namespace lipfast
