#include "cpu/noise.h"

#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

// A register of words, and of whole numbers with a sign.
using U = uint32_t __attribute__((vector_size(kRegisterLanes * sizeof(uint32_t))));
using I = int32_t __attribute__((vector_size(kRegisterLanes * sizeof(int32_t))));

constexpr int kWords = 4;                    // of a counter
constexpr int64_t kGroup = kWords * kLanes;  // numbers of sixteen counters: the first of each, the second of each, ...
constexpr int64_t kGroupsAtOnce = 64;

inline R ToFloats(U x) { return __builtin_convertvector(reinterpret_cast<I>(x), R); }  // below 2^31

inline void Mix(U& x, U& y, int rotation) {
  x += y;
  y = (y << rotation | y >> (32 - rotation)) ^ x;
}

// The words of counters first, first + 1, ... under the key (seed, step).
inline void Threefry(uint64_t first, uint64_t seed, uint64_t step, U (&x)[kWords]) {
  constexpr int kRotations[8][2] = {{10, 26}, {11, 21}, {13, 27}, {23, 5}, {6, 20}, {17, 11}, {25, 10}, {18, 20}};
  uint32_t key[5] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(step),
                     static_cast<uint32_t>(step >> 32), 0x1BD11BDA};
  for (int k = 0; k < kWords; ++k) key[4] ^= key[k];
  U counters = {};
  for (int i = 0; i < kRegisterLanes; ++i) counters[i] = static_cast<uint32_t>(i);
  x[0] = counters + static_cast<uint32_t>(first) + key[0];  // groups begin at multiples of 16: no carry
  x[1] = U{} + static_cast<uint32_t>(first >> 32) + key[1];
  x[2] = U{} + key[2];
  x[3] = U{} + key[3];
  LIPFAST_UNROLL
  for (int round = 0; round < 20; ++round) {
    const int* rotation = kRotations[round % 8];
    Mix(x[0], x[round % 2 ? 3 : 1], rotation[0]);
    Mix(x[2], x[round % 2 ? 1 : 3], rotation[1]);
    if (round % 4 < 3) continue;
    const uint32_t turn = round / 4 + 1;
    for (uint32_t k = 0; k < kWords; ++k) x[k] += key[(turn + k) % 5];
    x[3] += turn;
  }
}

// ln u, 0 < u <= 1, by the polynomial of Cephes' logf: to the last digit or two.
inline R Log(R u) {
  const U bits = reinterpret_cast<U>(u), half = (bits & 0x7fffff) | 0x3f000000;  // the mantissa, in [0.5, 1)
  const U low = (half - 0x3f3504f3) >> 31;  // below the root of 0.5: twice that, and one less in the exponent
  const R e = __builtin_convertvector(reinterpret_cast<I>(bits >> 23) - 126 - reinterpret_cast<I>(low), R);
  const R m = reinterpret_cast<R>(half), x = m + ToFloats(low) * m - 1.0f, square = x * x;
  R y = SetR(7.0376836292e-2f);
  y = y * x - 1.1514610310e-1f;
  y = y * x + 1.1676998740e-1f;
  y = y * x - 1.2420140846e-1f;
  y = y * x + 1.4249322787e-1f;
  y = y * x - 1.6668057665e-1f;
  y = y * x + 2.0000714765e-1f;
  y = y * x - 2.4999993993e-1f;
  y = y * x + 3.3333331174e-1f;
  y = y * x * square;
  y = y - 2.12194440e-4f * e - 0.5f * square;
  return x + y + 0.693359375f * e;
}

// Two independent normals are the root of `squared` times cosine and sine.
inline void Polar(U for_radius, U for_angle, R& squared, R& cosine, R& sine) {
  squared = -2.0f * Log((ToFloats(for_radius >> 8) + 1.0f) * 0x1p-24f);
  // The angle: two bits say the quarter, 24 where in it, from -pi/4 to pi/4.
  const R t = (ToFloats(for_angle >> 6 & 0xffffff) * 0x1p-24f - 0.5f) * 1.57079632679f, square = t * t;
  const R s = ((-1.9515295891e-4f * square + 8.3321608736e-3f) * square - 1.6666654611e-1f) * square * t + t;
  const R c =
      ((2.443315711809948e-5f * square - 1.388731625493765e-3f) * square + 4.166664568298827e-2f) * square * square -
      0.5f * square + 1.0f;
  // A quarter turns (c, s) to (-s, c).
  const U quarter = for_angle >> 30, exchange = (reinterpret_cast<U>(c) ^ reinterpret_cast<U>(s)) & -(quarter & 1);
  cosine = reinterpret_cast<R>(reinterpret_cast<U>(c) ^ exchange ^ ((quarter ^ quarter >> 1) & 1) << 31);
  sine = reinterpret_cast<R>(reinterpret_cast<U>(s) ^ exchange ^ (quarter >> 1) << 31);
}

void Draw(int64_t group, uint64_t seed, uint64_t step, float (&numbers)[kGroup]) {
  alignas(64) float squared[2][kLanes];
  for (int lane = 0; lane < kLanes; lane += kRegisterLanes) {
    U words[kWords];
    Threefry(static_cast<uint64_t>(group) * kLanes + lane, seed, step, words);
    for (int pair = 0; pair < 2; ++pair) {
      R r, c, s;
      Polar(words[2 * pair], words[2 * pair + 1], r, c, s);
      Store(squared[pair] + lane, r);
      Store(numbers + 2 * pair * kLanes + lane, c);
      Store(numbers + (2 * pair + 1) * kLanes + lane, s);
    }
  }
  for (int k = 0; k < kWords; ++k) {
    float* number = numbers + k * kLanes;
    Store(number, Mul(Sqrt(Load(squared[k / 2])), Load(number)));
  }
}

void AddNoise(const float* base, int64_t n, float scale, uint64_t seed, uint64_t step, float* to, int threads) {
  const int64_t groups = (n + kGroup - 1) / kGroup;
  ParallelFor(threads, (groups + kGroupsAtOnce - 1) / kGroupsAtOnce, [&](int64_t chunk) {
    const int64_t last = groups < (chunk + 1) * kGroupsAtOnce ? groups : (chunk + 1) * kGroupsAtOnce;
    for (int64_t group = chunk * kGroupsAtOnce; group < last; ++group) {
      alignas(64) float numbers[kGroup];
      Draw(group, seed, step, numbers);
      const int64_t begin = group * kGroup, count = n - begin < kGroup ? n - begin : kGroup;
      for (int64_t i = 0; i < count; ++i) to[begin + i] = base[begin + i] + scale * numbers[i];
    }
  });
}

}  // namespace

extern const NoiseKernels noise_kernels;
const NoiseKernels noise_kernels = {AddNoise};

}  // namespace LIPFAST_NS
}  // namespace lipfast
