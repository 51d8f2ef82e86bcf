// Activations and their derivatives on one vector; for kernel sources only.
#pragma once

#include "cpu/pointwise.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {

// e^x to 2 units in the last place; 0 below and inf above float's range.
static inline V Exp(V x) {
  const V low = Set(-87.3f), high = Set(88.7f);
  const V bounded = Max(low, Min(high, x));  // NaN comes out as NaN: the second operand wins
  const V n = Round(Mul(bounded, Set(1.44269504f)));
  const V r = Fma(n, Set(2.12194440e-4f), Fma(n, Set(-0.693359375f), bounded));
  V p = Fma(Set(1.9875691500e-4f), r, Set(1.3981999507e-3f));
  p = Fma(p, r, Set(8.3334519073e-3f));
  p = Fma(p, r, Set(4.1665795894e-2f));
  p = Fma(p, r, Set(1.6666665459e-1f));
  p = Fma(p, r, Set(5.0000001201e-1f));
  p = Add(Fma(Mul(p, r), r, r), Set(1.0f));
  return TimesPowerOfTwo(p, n);
}

// a * sigmoid(x)
static inline V TimesSigmoid(V a, V x) { return Div(a, Add(Set(1.0f), Exp(Sub(Zero(), x)))); }

static inline V Sigmoid(V x) { return TimesSigmoid(Set(1.0f), x); }

static inline V Tanh(V x) {
  // Through e^(2x) - 1 directly near zero, where 2 sigmoid(2x) - 1 would cancel.
  const V x2 = Mul(x, x);
  const V series = Fma(Mul(x, x2), Fma(x2, Fma(x2, Set(-17.0f / 315.0f), Set(2.0f / 15.0f)), Set(-1.0f / 3.0f)), x);
  const V full = Sub(Mul(Set(2.0f), Sigmoid(Add(x, x))), Set(1.0f));
  return IfPositive(Sub(x2, Set(0.01f)), full, series);
}

// The normal distribution's function at z, to 2e-7; 0 from -5.4 down, where 1 + erf in float is 0, too.
//
// 1/2 + z p(z^2) / q(z^2), fitted for the least largest error of z p / q, which is 9e-9: the rest is rounding. Short,
// with one division and no exponential.
static inline V NormalCdf(V z) {
  const V most = Set(5.4f), bounded = Min(most, z), square = Mul(bounded, bounded);
  V p = Fma(Set(5.13246414e-6f), square, Set(1.55288537e-4f));
  p = Fma(p, square, Set(4.53268597e-3f));
  p = Fma(p, square, Set(3.31589840e-2f));
  p = Fma(p, square, Set(0.398942232f));
  V q = Fma(Set(-1.83260995e-9f), square, Set(7.39572556e-7f));
  q = Fma(q, square, Set(6.53168026e-5f));
  q = Fma(q, square, Set(1.78501464e-3f));
  q = Fma(q, square, Set(2.79939920e-2f));
  q = Fma(q, square, Set(0.249783009f));
  q = Fma(q, square, Set(1.0f));
  return IfPositive(Add(z, most), Fma(bounded, Div(p, q), Set(0.5f)), Zero());
}

// twice sqrt(2 / pi) (z + 0.044715 z^3), whose sigmoid stands for NormalCdf(z)
static inline V GeluArgument(V z) { return Mul(z, Fma(Mul(z, z), Set(0.07135482f), Set(1.5957691f))); }

// Between 0 and 6; this order lets NaN through.
static inline V UpTo6(V z) { return Max(Zero(), Min(Set(6.0f), z)); }

// 1 strictly between two bounds, 0 elsewhere
static inline V Between(V z, V low, V high) {
  return IfPositive(Sub(z, low), IfPositive(Sub(high, z), Set(1.0f), Zero()), Zero());
}

template <Activation kAct>
static inline V Act(V z, V slope) {
  switch (kAct) {
    case Activation::kRelu:
      return Max(Zero(), z);  // this order lets NaN through
    case Activation::kLeaky:
      return IfPositive(z, z, Mul(z, slope));
    case Activation::kSigmoid:
      return Sigmoid(z);
    case Activation::kTanh:
      return Tanh(z);
    case Activation::kSilu:
      return TimesSigmoid(z, z);
    case Activation::kRelu6:
      return UpTo6(z);
    case Activation::kHardsigmoid:
      return Mul(UpTo6(Add(z, Set(3.0f))), Set(1.0f / 6.0f));
    case Activation::kHardswish:
      return Mul(Mul(z, UpTo6(Add(z, Set(3.0f)))), Set(1.0f / 6.0f));
    case Activation::kGelu:
      return Mul(z, NormalCdf(z));
    case Activation::kGeluTanh:
      return TimesSigmoid(z, GeluArgument(z));
    default:
      return z;
  }
}

// The activations that cost next to nothing, chosen at run time; others are left out.
static inline V SimpleAct(V z, const ActivationSpec& act) {
  if (act.kind == Activation::kRelu) return Act<Activation::kRelu>(z, Zero());
  if (act.kind == Activation::kLeaky) return Act<Activation::kLeaky>(z, Set(act.slope));
  if (act.kind == Activation::kRelu6) return UpTo6(z);
  return z;
}

// d act(z) / dz
template <Activation kAct>
static inline V ActSlope(V z, V slope) {
  const V one = Set(1.0f);
  switch (kAct) {
    case Activation::kRelu:
      return IfPositive(z, one, Zero());
    case Activation::kLeaky:
      return IfPositive(z, one, slope);
    case Activation::kSigmoid: {
      const V s = Sigmoid(z);
      return Mul(s, Sub(one, s));
    }
    case Activation::kTanh: {
      const V t = Tanh(z);
      return Sub(one, Mul(t, t));
    }
    case Activation::kSilu: {
      const V s = Sigmoid(z);
      return Mul(s, Fma(z, Sub(one, s), one));
    }
    case Activation::kRelu6:
      return Between(z, Zero(), Set(6.0f));
    case Activation::kHardsigmoid:
      return Mul(Between(z, Set(-3.0f), Set(3.0f)), Set(1.0f / 6.0f));
    case Activation::kHardswish: {
      const V rising = Fma(z, Set(1.0f / 3.0f), Set(0.5f));
      return IfPositive(Sub(Set(3.0f), z), IfPositive(Add(z, Set(3.0f)), rising, Zero()), one);
    }
    case Activation::kGelu: {
      const V density = Mul(Set(0.39894228f), Exp(Mul(Mul(z, Set(-0.5f)), z)));
      return Fma(z, density, NormalCdf(z));
    }
    case Activation::kGeluTanh: {
      const V s = Sigmoid(GeluArgument(z));
      const V rise = Fma(Mul(z, z), Set(3 * 0.07135482f), Set(1.5957691f));  // of the argument
      return Mul(s, Fma(Mul(z, Sub(one, s)), rise, one));
    }
    default:
      return one;
  }
}

// Calls Body<activation>::Run(arguments...) for the activation chosen at run time.
template <template <Activation> class Body, class... Arguments>
static inline void WithActivation(Activation act, const Arguments&... arguments) {
  switch (act) {
    case Activation::kRelu:
      return Body<Activation::kRelu>::Run(arguments...);
    case Activation::kLeaky:
      return Body<Activation::kLeaky>::Run(arguments...);
    case Activation::kSigmoid:
      return Body<Activation::kSigmoid>::Run(arguments...);
    case Activation::kTanh:
      return Body<Activation::kTanh>::Run(arguments...);
    case Activation::kSilu:
      return Body<Activation::kSilu>::Run(arguments...);
    case Activation::kRelu6:
      return Body<Activation::kRelu6>::Run(arguments...);
    case Activation::kHardsigmoid:
      return Body<Activation::kHardsigmoid>::Run(arguments...);
    case Activation::kHardswish:
      return Body<Activation::kHardswish>::Run(arguments...);
    case Activation::kGelu:
      return Body<Activation::kGelu>::Run(arguments...);
    case Activation::kGeluTanh:
      return Body<Activation::kGeluTanh>::Run(arguments...);
    case Activation::kNone:
      return Body<Activation::kNone>::Run(arguments...);
  }
}

}  // namespace LIPFAST_NS
}  // namespace lipfast
