#include "cpu/adam.h"

#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

constexpr int64_t kChunk = 8192;  // four arrays of it fit in L2 with room to spare

// a * b + c rounded once on every target; vec.h's Fma rounds twice on the plain one.
V Fused(V a, V b, V c) {
#if LIPFAST_TARGET == 0
  alignas(64) float x[kLanes], y[kLanes], z[kLanes];
  Store(x, a);
  Store(y, b);
  Store(z, c);
  for (int i = 0; i < kLanes; ++i) z[i] = __builtin_fmaf(x[i], y[i], z[i]);
  return Load(z);
#else
  return Fma(a, b, c);
#endif
}

V SetDouble(double x) { return Set(static_cast<float>(x)); }

// Visits [0, n) in vectors of 16, the last one partial: body(offset, count).
template <class Body>
void ForEachVector(int64_t n, int threads, const Body& body) {
  ParallelFor(threads, (n + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk;
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    for (int64_t i = begin; i < end; i += kLanes) body(i, end - i < kLanes ? static_cast<int>(end - i) : kLanes);
  });
}

V Read(const float* p, int count) { return count == kLanes ? LoadU(p) : LoadPart(p, count); }

void Write(float* p, V x, int count) {
  if (count == kLanes) {
    StoreU(p, x);
  } else {
    StorePart(p, x, count);
  }
}

void Adam(const AdamSettings& s, int64_t step, float* values, const float* gradient, float* m, float* v, int64_t n,
          int threads) {
  const double correction1 = 1 - pow(s.beta1, static_cast<double>(step));
  const double correction2 = 1 - pow(s.beta2, static_cast<double>(step));
  const bool decays = s.weight_decay != 0;
  const V decay = SetDouble(s.weight_decay), beta2 = SetDouble(s.beta2), rest2 = SetDouble(1 - s.beta2);
  const V root2 = SetDouble(pow(correction2, 0.5)), eps = SetDouble(s.eps), rate = SetDouble(-(s.lr / correction1));
  // torch.lerp starts from the nearer end: m + w (g - m) or, from w = 0.5 on, g + (w - 1)(g - m).
  const float w = static_cast<float>(1 - s.beta1);
  const bool from_m = w < 0.5f;
  const V pull = Set(from_m ? w : w - 1);
  ForEachVector(n, threads, [&](int64_t i, int count) {
    const V old = Read(values + i, count);
    V g = Read(gradient + i, count);
    if (decays) g = Fused(old, decay, g);
    V first = Read(m + i, count);
    first = Fused(pull, Sub(g, first), from_m ? first : g);
    const V second = Fused(Mul(rest2, g), g, Mul(Read(v + i, count), beta2));
    const V denominator = Add(Div(Sqrt(second), root2), eps);
    Write(m + i, first, count);
    Write(v + i, second, count);
    Write(values + i, Add(old, Div(Mul(rate, first), denominator)), count);
  });
}

void Sgd(const SgdSettings& s, int64_t step, float* values, const float* gradient, float* momentum_buffer, int64_t n,
         int threads) {
  const bool decays = s.weight_decay != 0, has_momentum = s.momentum != 0;
  const V decay = SetDouble(s.weight_decay), momentum = SetDouble(s.momentum), damp = SetDouble(1 - s.dampening);
  const V rate = SetDouble(-s.lr);
  ForEachVector(n, threads, [&](int64_t i, int count) {
    const V old = Read(values + i, count);
    V g = Read(gradient + i, count);
    if (decays) g = Fused(old, decay, g);
    if (has_momentum) {
      const V buffer = step == 1 ? g : Fused(g, damp, Mul(Read(momentum_buffer + i, count), momentum));
      Write(momentum_buffer + i, buffer, count);
      g = s.nesterov ? Fused(buffer, momentum, g) : buffer;
    }
    Write(values + i, Fused(g, rate, old), count);
  });
}

}  // namespace

extern const StepKernels step_kernels;
const StepKernels step_kernels = {Adam, Sgd};

}  // namespace LIPFAST_NS
}  // namespace lipfast
