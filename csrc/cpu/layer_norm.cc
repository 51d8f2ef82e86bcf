#include "cpu/layer_norm.h"

#include <cstring>

#include "cpu/activation.h"
#include "cpu/channel_pieces.h"
#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

constexpr int64_t kMostChunks = 16;  // of pieces with sums of their own

int64_t Chunks(const LaneMap& m) { return AtMost(Pieces(m), kMostChunks); }

template <int kVectors>
struct Moments {
  V mean[kVectors], inverse[kVectors];
  V shift[kVectors];  // what is taken off x

  Moments(const Columns& x, int64_t channels, const LayerNormSpec& spec) {
    const V share = Set(1.0f / static_cast<float>(channels));
    SumChannels<kVectors>(channels, x, mean);
    for (int k = 0; k < kVectors; ++k) mean[k] = Mul(mean[k], share);
    SumChannels<kVectors>(
        channels,
        [&](int64_t c, int k) {
          const V v = Sub(x(c, k), mean[k]);
          return Mul(v, v);
        },
        inverse);
    for (int k = 0; k < kVectors; ++k) {
      inverse[k] = Div(Set(1.0f), Sqrt(Fma(inverse[k], share, Set(spec.epsilon))));
      shift[k] = spec.centred ? mean[k] : Zero();
    }
  }
};

struct ForwardPiece {
  const LaneMap &x, &y;
  const LayerNormSpec& spec;

  template <int kVectors>
  void Of(const Place& at) const {
    const Columns in(x, at), out(y, at);
    const Moments<kVectors> moments(in, x.channels, spec);
    for (int64_t c = 0; c < x.channels; ++c) {
      const V gamma = Set(spec.gamma ? spec.gamma[c] : 1.0f), beta = Set(spec.beta ? spec.beta[c] : 0.0f);
      LIPFAST_UNROLL
      for (int k = 0; k < kVectors; ++k) {
        const V normalised = Mul(Sub(in(c, k), moments.shift[k]), moments.inverse[k]);
        Store(out.At(c, k), Fma(gamma, normalised, beta));
      }
    }
  }
};

struct BackwardPiece {
  const LaneMap &x, &dy, &dx;
  const LayerNormSpec& spec;
  bool accumulate;
  float* sums;  // a vector of each channel of what gamma's gradient is made of, then of beta's; null: not wanted

  template <int kVectors>
  void Of(const Place& at) const {
    const int64_t channels = x.channels;
    const Columns in(x, at), gradient(dy, at), out(dx, at);
    const Moments<kVectors> moments(in, channels, spec);
    const auto normalised = [&](int64_t c, int k) { return Mul(Sub(in(c, k), moments.shift[k]), moments.inverse[k]); };
    const auto standard = [&](int64_t c, int k) { return Mul(Sub(in(c, k), moments.mean[k]), moments.inverse[k]); };
    const auto inner = [&](int64_t c, int k) { return Mul(gradient(c, k), Set(spec.gamma ? spec.gamma[c] : 1.0f)); };
    for (int64_t c = 0; sums && c < channels; ++c) {
      float *to_gamma = sums + c * kVector, *to_beta = to_gamma + channels * kVector;
      V of_gamma = Load(to_gamma), of_beta = Load(to_beta);
      LIPFAST_UNROLL
      for (int k = 0; k < kVectors; ++k) {
        of_gamma = Fma(gradient(c, k), normalised(c, k), of_gamma);
        of_beta = Add(of_beta, gradient(c, k));
      }
      Store(to_gamma, of_gamma);
      Store(to_beta, of_beta);
    }
    V mean[kVectors], along[kVectors];
    SumChannels<kVectors>(channels, inner, mean);
    SumChannels<kVectors>(channels, [&](int64_t c, int k) { return Mul(inner(c, k), normalised(c, k)); }, along);
    const V share = Set(1.0f / static_cast<float>(channels)), back = Set(-1.0f / static_cast<float>(channels));
    for (int k = 0; k < kVectors; ++k) {
      mean[k] = spec.centred ? Mul(mean[k], share) : Zero();
      along[k] = Mul(along[k], back);
    }
    for (int64_t c = 0; c < channels; ++c) {
      LIPFAST_UNROLL
      for (int k = 0; k < kVectors; ++k) {
        const V change = Mul(moments.inverse[k], Fma(along[k], standard(c, k), Sub(inner(c, k), mean[k])));
        Put(out.At(c, k), change, accumulate);
      }
    }
  }
};

void Forward(const LaneMap& x, const LaneMap& y, const LayerNormSpec& spec, int threads) {
  ForEachPiece(x, threads, ForwardPiece{x, y, spec});
}

int64_t BackwardFloats(const LaneMap& x) { return Chunks(x) * 2 * x.channels * kVector; }

// Of a vector in each chunk.
float SumChunks(const float* vectors, int64_t chunks, int64_t size) {
  V total = Zero();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total = Add(total, Load(vectors + chunk * size));
  return Sum(total);
}

void Backward(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, const LayerNormSpec& spec, bool accumulate,
              float* dgamma, float* dbeta, float* partial, int threads) {
  const int64_t pieces = Pieces(x), chunks = Chunks(x), size = 2 * x.channels * kVector;
  const bool wanted = dgamma || dbeta;
  ParallelFor(threads, chunks, [&](int64_t chunk) {
    float* sums = wanted ? partial + chunk * size : nullptr;
    if (sums) std::memset(sums, 0, size * sizeof(float));
    const BackwardPiece run = {x, dy, dx, spec, accumulate, sums};
    for (int64_t i = pieces * chunk / chunks; i < pieces * (chunk + 1) / chunks; ++i) RunPiece(PieceAt(x, i), run);
  });
  ParallelFor(threads, wanted ? x.channels : 0, [&](int64_t c) {
    if (dgamma) dgamma[c] = SumChunks(partial + c * kVector, chunks, size);
    if (dbeta) dbeta[c] = SumChunks(partial + (x.channels + c) * kVector, chunks, size);
  });
}

}  // namespace

extern const LayerNormKernels layer_norm_kernels;
const LayerNormKernels layer_norm_kernels = {Forward, Backward, BackwardFloats};

}  // namespace LIPFAST_NS
}  // namespace lipfast
