// Which kernel runs a direction of a convolution: from its shape, its size and the number
// of kept weights alone. A model of costs, never timed at run time: equal inputs give
// equal bits.
#pragma once

#include <cstdint>

#include "cpu/conv.h"

namespace lipfast {

enum class ConvDirection { kForward = 0, kInputGradient = 1, kWeightGradient = 2 };

// `asked` wins where that kernel can do the layer. exact: never Winograd.
ConvKernel ChooseKernel(ConvKernel asked, const ConvShape& shape, const ConvGeometry& geometry, int64_t kept,
                        ConvDirection direction, bool exact);

}  // namespace lipfast
