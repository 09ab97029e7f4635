// CSQ_HD marks a function for the processor and, where nvcc compiles it, for a CUDA device too.
#pragma once

#if defined(__CUDACC__)
#define CSQ_HD __host__ __device__ __forceinline__
#else
#define CSQ_HD inline
#endif
