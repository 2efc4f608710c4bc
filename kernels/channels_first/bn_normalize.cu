// bn_normalize: out = activation((x - mean) * rstd * weight + bias + residual)
//
// In training mean and var are the merged parts of bn_stats, and the running statistics follow them; else they are the
// running statistics. Team (c, s) merges the parts of channel c, in the same order in every block, and then takes its share
// of the channel.
// Mirror: numpy_ops.bn_normalize
#include "packs.cuh"
#include "../normalizing.cuh"
#include "../parts.cuh"
#include "../running.cuh"

extern "C" __global__ void REGISTERS(INDEX_BITS == 64 || WIDTH < 4 ? 80 : 72) bn_normalize(
    const data_t* x,                         // [N, C, L]
    const double* moments_count,             // [P] or null: normalise with the running statistics
    const double* moments_mean,              // [P, C] or null
    const double* moments_m2,                // [P, C] or null
    const long long* moments_batches,        // [] or null: momentum is 1 / (batches + 1)
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    const data_t* residual,                  // [N, C, L] or null
    long long activation,                    // 0: none, 1: ReLU
    Vector running_mean,                     // [C] or null; updated in training
    Vector running_var,                      // [C] or null; updated in training
    double momentum,
    long long* num_batches_tracked,          // [] or null
    // outputs
    data_t* out,                             // [N, C, L]; may be x or residual
    mask_t* mask,                            // [N, C, L / WIDTH] or null: where ReLU passes
    double* statistics_mean,                 // [C] or null
    double* statistics_var,                  // [C] or null
    // sizes
    long long parts,
    long long N,
    long long C,
    long long L,
    long long packs_per_share) {
    const Place place(C, true);
    const long long c = place.c;
    const index_t begin = (index_t)place.share * packs_per_share;
    const Packs own(place, C, L, begin, min(begin + (index_t)packs_per_share, (index_t)(N * L / WIDTH)));

    __shared__ Channel channels[TEAMS];
    __shared__ Moments merged[TEAMS];  // for the end: registers are wanted until then
    Channel& channel = channels[team()];
    Moments& batch = merged[team()];
    if (member() < WARP) {
        Affine given;
        if (member() == 0) given = read_affine(weight, bias, c);
        Moments all;
        if (moments_count) all = merge_parts(moments_count, 1, moments_mean, moments_m2, C, parts, c);
        if (member() == 0) {
            if (!moments_count) all = {1, running_mean.get(c), running_var.get(c)};
            channel = make_channel(all.mean, all.m2 / all.count, eps, given);
            batch = all;
        }
    }
    __syncthreads();

    normalize_all(InMemory{x}, own, residual, activation, OneChannel(channel), out, mask);
    if (!place.owns()) return;
    if (statistics_mean) statistics_mean[c] = batch.mean;
    if (statistics_var) statistics_var[c] = batch.m2 / batch.count;
    if (moments_count && running_mean)
        update_running(batch, read_running(running_mean, running_var, c), running_mean, running_var, momentum,
                       moments_batches, c);
    if (c == 0 && num_batches_tracked) *num_batches_tracked += 1;
}
