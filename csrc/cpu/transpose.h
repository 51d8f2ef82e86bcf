// 8 x 8 and 16 x 16 transposes in registers.
#pragma once

#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {

// to[i][l] = from[l][i], eight rows of eight.
static inline void Transpose8(const float* const* from, float* const* to) {
#if LIPFAST_TARGET == 0
  for (int i = 0; i < 8; ++i) {
    for (int l = 0; l < 8; ++l) to[i][l] = from[l][i];
  }
#else
  for (int column = 0; column < 8; column += 4) {
    __m256 v[4];
    LIPFAST_UNROLL
    for (int j = 0; j < 4; ++j) {
      v[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from[j] + column)),
                                  _mm_loadu_ps(from[j + 4] + column), 1);
    }
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[0], v[1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(v[0], v[1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(v[2], v[3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(v[2], v[3]));
    _mm256_storeu_ps(to[column], _mm256_castpd_ps(_mm256_unpacklo_pd(a, c)));
    _mm256_storeu_ps(to[column + 1], _mm256_castpd_ps(_mm256_unpackhi_pd(a, c)));
    _mm256_storeu_ps(to[column + 2], _mm256_castpd_ps(_mm256_unpacklo_pd(b, d)));
    _mm256_storeu_ps(to[column + 3], _mm256_castpd_ps(_mm256_unpackhi_pd(b, d)));
  }
#endif
}

#if LIPFAST_TARGET == 2
// to[i][l] = from[l][i], sixteen rows of four: loads put the 4 x 4 blocks in place, and only the transposes inside
// them occupy the shuffle unit.
static inline void TransposeFour(const float* const* from, float* const* to) {
  V v[4];
  LIPFAST_UNROLL
  for (int j = 0; j < 4; ++j) {
    V x = _mm512_castps128_ps512(_mm_loadu_ps(from[j]));
    x = _mm512_insertf32x4(x, _mm_loadu_ps(from[j + 4]), 1);
    x = _mm512_insertf32x4(x, _mm_loadu_ps(from[j + 8]), 2);
    v[j] = _mm512_insertf32x4(x, _mm_loadu_ps(from[j + 12]), 3);
  }
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1]));
  const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1]));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3]));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
  StoreU(to[0], _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)));
  StoreU(to[1], _mm512_castpd_ps(_mm512_unpackhi_pd(a, c)));
  StoreU(to[2], _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)));
  StoreU(to[3], _mm512_castpd_ps(_mm512_unpackhi_pd(b, d)));
}
#endif

// to[i * stride + l] = from[l * 16 + i]; `from` and the rows of `to` are aligned.
// With AVX-512 it is cheaper from memory than Transpose16.
static inline void TransposeBlock(const float* from, float* to, int64_t stride) {
#if LIPFAST_TARGET == 2
  for (int column = 0; column < kLanes; column += 4) {
    const float* rows[kLanes];
    LIPFAST_UNROLL
    for (int l = 0; l < kLanes; ++l) rows[l] = from + l * kLanes + column;
    float* out = to + column * stride;
    float* const columns[4] = {out, out + stride, out + 2 * stride, out + 3 * stride};
    TransposeFour(rows, columns);
  }
#elif LIPFAST_TARGET == 1
  for (int half = 0; half < kLanes; half += 8) {
    for (int column = 0; column < kLanes; column += 8) {
      const float* rows[8];
      float* columns[8];
      LIPFAST_UNROLL
      for (int i = 0; i < 8; ++i) {
        rows[i] = from + (half + i) * kLanes + column;
        columns[i] = to + (column + i) * stride + half;
      }
      Transpose8(rows, columns);
    }
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int l = 0; l < kLanes; ++l) to[i * stride + l] = from[l * kLanes + i];
  }
#endif
}

// out[i][l] = in[l][i]
static inline void Transpose16(V* v) {
#if LIPFAST_TARGET == 2
  V t[16];
  LIPFAST_UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  LIPFAST_UNROLL
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    v[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    v[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    v[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  // v[4 g + j] now holds column 4 q + j of rows 4 g .. 4 g + 3 in its quarter q.
  LIPFAST_UNROLL
  for (int j = 0; j < 4; ++j) {
    const V ab_even = _mm512_shuffle_f32x4(v[j], v[4 + j], 0x88);
    const V ab_odd = _mm512_shuffle_f32x4(v[j], v[4 + j], 0xdd);
    const V cd_even = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0x88);
    const V cd_odd = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(ab_even, cd_even, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(ab_even, cd_even, 0xdd);
    t[4 + j] = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd);
  }
  LIPFAST_UNROLL
  for (int i = 0; i < 16; ++i) v[i] = t[i];
#else
  alignas(64) float t[kLanes * kLanes], u[kLanes * kLanes];
  for (int i = 0; i < kLanes; ++i) Store(t + i * kLanes, v[i]);
  TransposeBlock(t, u, kLanes);
  for (int i = 0; i < kLanes; ++i) v[i] = Load(u + i * kLanes);
#endif
}

}  // namespace LIPFAST_NS
}  // namespace lipfast
