// merge_sums: the sums of each channel over P parts, divided by count, as a row: C of dy, C of dy * xhat
//
// The parts are those of the batch of one rank, count that of the whole batch: the rows of all ranks add up to means.
// A block per channel, which also writes the gradients of this rank: dweight = sum(dy * xhat), dbias = sum(dy).
// Mirror: numpy_ops.merge_sums
#include "parts.cuh"

extern "C" __global__ void REGISTERS(80) merge_sums(
    const double* sums_dy,                   // [P, C]
    const double* sums_dy_xhat,              // [P, C]
    const double* count,                     // [1]
    Vector dweight,                          // [C] or null
    Vector dbias,                            // [C] or null
    // outputs
    double* row,                             // [2 C]
    // sizes
    long long parts,
    long long C) {
    const long long c = blockIdx.x + (long long)blockIdx.z * gridDim.x;
    if (c >= C) return;
    double sums[2];
    add_parts(sums_dy, sums_dy_xhat, parts, C, c, sums);
    if (threadIdx.x == 0) {
        if (dweight) dweight.set(c, sums[1]);
        if (dbias) dbias.set(c, sums[0]);
        const double divisor = *count < 1 ? 1 : *count;  // nothing at all: zeros
        row[c] = sums[0] / divisor;
        row[C + c] = sums[1] / divisor;
    }
}
