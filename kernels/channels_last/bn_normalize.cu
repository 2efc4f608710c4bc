// bn_normalize: out = activation((x - mean) * rstd * weight + bias + residual)
//
// In training mean and var are the merged parts of bn_stats, and the running statistics follow them; else they are the
// running statistics. Block (t, s) merges the parts of the channels of tile t, in the same order in every block, and then
// takes its share of the rows.
// Mirror: numpy_ops.bn_normalize
#include "../normalizing.cuh"
#include "../running.cuh"
#include "parts.cuh"

extern "C" __global__ void REGISTERS(INDEX_BITS == 32 ? 80 : 128) bn_normalize(
    const data_t* x,                         // [M, C]
    const double* moments_count,             // [P] or null: normalise with the running statistics
    const double* moments_mean,              // [P, C] or null
    const double* moments_m2,                // [P, C] or null
    const long long* moments_batches,        // [] or null: momentum is 1 / (batches + 1)
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    const data_t* residual,                  // [M, C] or null
    long long activation,                    // 0: none, 1: ReLU
    Vector running_mean,                     // [C] or null; updated in training
    Vector running_var,                      // [C] or null; updated in training
    double momentum,
    long long* num_batches_tracked,          // [] or null
    // outputs
    data_t* out,                             // [M, C]; may be x or residual
    mask_t* mask,                            // [M, C / WIDTH] or null: where ReLU passes
    double* statistics_mean,                 // [C] or null
    double* statistics_var,                  // [C] or null
    // sizes
    long long parts,
    long long M,
    long long C,
    long long tile,
    long long rows_per_share) {
    const Tile own(M, C, tile, rows_per_share, backwards());
    const long long c = own.channel();
    const bool writes = own.looks_after() && own.begin == 0;
    __shared__ Lanes lanes;
    Affine given;
    if (own.looks_after()) given = read_affine(weight, bias, c);
    Moments batch = {0, 0, 0};
    if (moments_count) batch = merge_parts(own, moments_count, moments_mean, moments_m2, parts, C);
    if (own.looks_after()) {
        const double mean = moments_count ? batch.mean : running_mean.get(c);
        const double var = moments_count ? batch.m2 / batch.count : running_var.get(c);
        lanes.set(threadIdx.x, make_channel(mean, var, eps, given));
        if (writes) {
            if (statistics_mean) statistics_mean[c] = mean;
            if (statistics_var) statistics_var[c] = var;
        }
    }
    const OwnChannels channels(own, lanes);

    normalize_all(InMemory{x}, Packs(own), residual, activation, channels, out, mask);
    if (!writes) return;
    if (moments_count && running_mean)
        update_running(batch, read_running(running_mean, running_var, c), running_mean, running_var, momentum,
                       moments_batches, c);
    if (c == 0 && num_batches_tracked) *num_batches_tracked += 1;
}
