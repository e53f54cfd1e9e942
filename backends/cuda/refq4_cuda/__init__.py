"""refq4's CUDA backend: kernels in CUDA C++, compiled on first use by NVRTC, and run without a GPU by an emulator."""
