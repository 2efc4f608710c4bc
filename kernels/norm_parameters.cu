// norm_parameters: the gradients of weight and bias, dweight = sum(dy * xhat) and dbias = sum(dy) of each channel, from
// P parts
//
// A block takes as many neighbouring channels as a warp has threads. Each of its warps adds up some of the parts, one
// after the other, and the first warp adds up what they have.
// Mirror: numpy_norms.norm_parameters
#include "channel.cuh"
#include "team.cuh"

extern "C" __global__ void REGISTERS(64) norm_parameters(
    Sums sums,
    Vector dweight,                          // [C] or null
    Vector dbias,                            // [C] or null
    // sizes
    long long parts,
    long long C) {
    constexpr int WARPS = THREADS / WARP;
    __shared__ double of_warps[2][WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const long long c = blockIdx.x * (long long)WARP + lane;
    double own[2] = {0, 0};
    if (c < C)
#pragma unroll 4
        for (long long p = warp; p < parts; p += WARPS) {
            own[0] += sums.dy[p * C + c];
            own[1] += sums.dy_xhat[p * C + c];
        }
    of_warps[0][warp][lane] = own[0];
    of_warps[1][warp][lane] = own[1];
    __syncthreads();
    if (warp > 0 || c >= C) return;
    double both[2] = {0, 0};
    for (int w = 0; w < WARPS; w++)
#pragma unroll
        for (int k = 0; k < 2; k++) both[k] += of_warps[k][w][lane];
    set_vectors(dweight, dbias, both, c);
}
