"""The forward on a CUDA device: few kernels a layer, captured as CUDA graphs."""
