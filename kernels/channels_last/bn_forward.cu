// bn_forward: batch norm in training, out = activation((x - mean) * rstd * weight + bias + residual), and the running
// statistics follow
//
// Each element is read once. A block takes a tile of columns, which fits into its shared memory; each thread keeps some of the
// packs of one column there. It adds them up as they come in; the sums of all threads make the statistics.
// Mirror: numpy_ops.bn_forward
#include "../normalizing.cuh"
#include "../running.cuh"
#include "statistics.cuh"

extern "C" __global__ void REGISTERS(128) bn_forward(
    const data_t* x,                         // [M, C]
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    const data_t* residual,                  // [M, C] or null
    long long activation,                    // 0: none, 1: ReLU
    Vector running_mean,                     // [C] or null; updated
    Vector running_var,                      // [C] or null; updated
    double momentum,
    long long* num_batches_tracked,          // [] or null
    // outputs
    data_t* out,                             // [M, C]; may be x or residual
    mask_t* mask,                            // [M, C / WIDTH] or null: where ReLU passes
    double* statistics_mean,                 // [C] or null
    double* statistics_var,                  // [C] or null
    // sizes
    long long M,
    long long C,
    long long tile) {
    const Tile own(M, C, tile, M, 0);
    const long long c = own.channel();
    const Packs packs(own);
    raw_t* const kept = staging() + threadIdx.x;
    const OnChip source = {kept, stage<CHUNK>({kept}, {x}, packs)};
    Affine given;
    __shared__ Running before[MOST_LANES];  // read while copies are on their way, and kept where no registers are wanted
    if (own.looks_after()) {
        given = read_affine(weight, bias, c);
        if (running_mean) before[threadIdx.x] = read_running(running_mean, running_var, c);
    }

    const Moments batch = moments_of(own, source, packs, x, (double)M);
    const double var = batch.m2 / batch.count;
    __shared__ Lanes lanes;
    given.has_bias = (bool)bias;  // no register has held it until now
    if (own.looks_after()) lanes.set(threadIdx.x, make_channel(batch.mean, var, eps, given));
    const OwnChannels channels(own, lanes);

    normalize_all(source, packs, residual, activation, channels, out, mask);
    if (own.looks_after()) {
        if (statistics_mean) statistics_mean[c] = batch.mean;
        if (statistics_var) statistics_var[c] = var;
        if (running_mean) update_running(batch, before[threadIdx.x], running_mean, running_var, momentum, nullptr, c);
        if (c == 0 && num_batches_tracked) *num_batches_tracked += 1;
    }
}
