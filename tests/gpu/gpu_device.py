"""Where GPU kernels are tested: on a GPU when ``LIPFAST_TEST_DEVICE=cuda`` promises one, else on the CPU.

On the CPU, Triton's interpreter runs the Triton kernels and the emulator the CUDA ones. The test bodies are the same.
"""

import os

DEVICE = os.environ.get("LIPFAST_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels' modules are imported
