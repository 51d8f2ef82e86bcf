#include "cpu/layer_norm.h"

#include <cstring>

#include "cpu/activation.h"
#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

constexpr int kPiece = 4;            // vectors of a row that are normalised together
constexpr int64_t kFlush = 64;       // channels summed up before they join the total: bounds the rounding error
constexpr int64_t kMostChunks = 16;  // of pieces with sums of their own
constexpr int64_t kVector = kLanes;

int64_t AtMost(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t PiecesOfRow(const LaneMap& m) { return (m.block_w + kPiece - 1) / kPiece; }
int64_t Pieces(const LaneMap& m) { return m.batch * m.block_h * PiecesOfRow(m); }
int64_t Chunks(const LaneMap& m) { return AtMost(Pieces(m), kMostChunks); }

struct Place {
  int64_t n, row, col, cols;
};

Place PieceAt(const LaneMap& m, int64_t i) {
  const int64_t of_row = PiecesOfRow(m), row = i / of_row, col = i % of_row * kPiece;
  return {row / m.block_h, row % m.block_h, col, AtMost(kPiece, m.block_w - col)};
}

// totals[k] = sum over channels of term(c, k)
template <int kVectors, class Term>
inline void SumChannels(int64_t channels, const Term& term, V* totals) {
  for (int k = 0; k < kVectors; ++k) totals[k] = Zero();
  for (int64_t first = 0; first < channels; first += kFlush) {
    V part[kVectors];
    for (int k = 0; k < kVectors; ++k) part[k] = Zero();
    const int64_t last = AtMost(first + kFlush, channels);
    for (int64_t c = first; c < last; ++c) {
      LIPFAST_UNROLL
      for (int k = 0; k < kVectors; ++k) part[k] = Add(part[k], term(c, k));
    }
    for (int k = 0; k < kVectors; ++k) totals[k] = Add(totals[k], part[k]);
  }
}

// kVectors neighbours of a map.
struct Columns {
  const float* data;
  int64_t channel;
  Columns(const LaneMap& m, const Place& at) : data(m.At(at.n, 0, at.row, at.col)), channel(m.channel_stride) {}
  V operator()(int64_t c, int k) const { return Load(data + c * channel + k * kVector); }
};

template <int kVectors>
struct Moments {
  V mean[kVectors], inverse[kVectors];

  Moments(const Columns& x, int64_t channels, float epsilon) {
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
      inverse[k] = Div(Set(1.0f), Sqrt(Fma(inverse[k], share, Set(epsilon))));
    }
  }
};

template <int kVectors>
void ForwardPiece(const LaneMap& x, const LaneMap& y, const LayerNormSpec& spec, const Place& at) {
  const Columns in(x, at);
  const Moments<kVectors> moments(in, x.channels, spec.epsilon);
  for (int64_t c = 0; c < x.channels; ++c) {
    const V gamma = Set(spec.gamma ? spec.gamma[c] : 1.0f), beta = Set(spec.beta ? spec.beta[c] : 0.0f);
    float* out = y.At(at.n, c, at.row, at.col);
    LIPFAST_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      const V normalised = Mul(Sub(in(c, k), moments.mean[k]), moments.inverse[k]);
      Store(out + k * kVector, Fma(gamma, normalised, beta));
    }
  }
}

// sums: a vector of each channel of what gamma's gradient is made of, then of beta's; null: not wanted.
template <int kVectors>
void BackwardPiece(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, const LayerNormSpec& spec, bool accumulate,
                   float* sums, const Place& at) {
  const int64_t channels = x.channels;
  const Columns in(x, at), gradient(dy, at);
  const Moments<kVectors> moments(in, channels, spec.epsilon);
  const auto normalised = [&](int64_t c, int k) { return Mul(Sub(in(c, k), moments.mean[k]), moments.inverse[k]); };
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
    mean[k] = Mul(mean[k], share);
    along[k] = Mul(along[k], back);
  }
  for (int64_t c = 0; c < channels; ++c) {
    float* out = dx.At(at.n, c, at.row, at.col);
    LIPFAST_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      const V change = Mul(moments.inverse[k], Fma(along[k], normalised(c, k), Sub(inner(c, k), mean[k])));
      Put(out + k * kVector, change, accumulate);
    }
  }
}

void Forward(const LaneMap& x, const LaneMap& y, const LayerNormSpec& spec, int threads) {
  ParallelFor(threads, Pieces(x), [&](int64_t i) {
    Place at = PieceAt(x, i);
    if (at.cols == kPiece) return ForwardPiece<kPiece>(x, y, spec, at);
    for (; at.cols > 0; --at.cols, ++at.col) ForwardPiece<1>(x, y, spec, at);
  });
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
    for (int64_t i = pieces * chunk / chunks; i < pieces * (chunk + 1) / chunks; ++i) {
      Place at = PieceAt(x, i);
      if (at.cols == kPiece) {
        BackwardPiece<kPiece>(x, dy, dx, spec, accumulate, sums, at);
        continue;
      }
      for (; at.cols > 0; --at.cols, ++at.col) BackwardPiece<1>(x, dy, dx, spec, accumulate, sums, at);
    }
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
