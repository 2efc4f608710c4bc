// merge_sums: the sums of each channel over P parts, divided by count, as a row: C of dy, C of dy * xhat
//
// The parts are those of the batch of one rank, count that of the whole batch: the rows of all ranks add up to means.
// There is a block for each channel, which also writes the gradients of this rank: dweight = sum(dy * xhat), dbias =
// sum(dy).
// Mirror: numpy_ops.merge_sums
#include "channel.cuh"
#include "parts.cuh"

extern "C" __global__ void REGISTERS(80) merge_sums(
    Sums sums,
    const double* count,                     // [1]
    Vector dweight,                          // [C] or null
    Vector dbias,                            // [C] or null
    // outputs
    double* row,                             // [2 C]
    // sizes
    long long parts,
    long long C) {
    const long long c = channel_of_block();
    if (c >= C) return;
    double own[2];
    add_parts(sums, parts, C, c, own);
    if (threadIdx.x == 0) {
        set_vectors(dweight, dbias, own, c);
        const double divisor = *count < 1 ? 1 : *count;  // a batch without values: zeros
        row[c] = own[0] / divisor;
        row[C + c] = own[1] / divisor;
    }
}
