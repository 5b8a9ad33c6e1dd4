"""Set before any module imports Triton, which reads it then: kernels for GPUs run in its interpreter."""

import os

os.environ["TRITON_INTERPRET"] = "1"
