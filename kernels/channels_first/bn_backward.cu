// bn_backward: all gradients, dx = (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where activation
// passed dy; dresidual = dy there; dweight = sum(dy * xhat), dbias = sum(dy)
//
// dy and x are read once. Cluster c takes channel c of both, which fit into the shared memory of its blocks; each thread
// keeps some of the slots.
// Mirror: numpy_ops.bn_backward
#include "gradient_sums.cuh"
#include "slots.cuh"

// dy becomes 0 where ReLU stopped it.
DEVICE void stop(raw_t* shared_dy, const raw_t* shared_x, const Slots& own, const mask_t* mask, long long packs,
                 const Channel& channel) {
    with_factors(channel, [&](const auto& factors) {
        for (Slots slots = own; slots.more(); slots.next()) {
            const Slot slot = slots.slot();
            if (slot.empty()) continue;
            raw_t& dy = shared_dy[slots.place()];
            dy = passed_on(dy, shared_x[slots.place()], Passed(true, mask_of(mask, slot, packs)), factors);
        }
    });
}

extern "C" __global__ void CLUSTER LAUNCH_BOUNDS bn_backward(
    const data_t* dy,                        // [N, C, L]
    const data_t* x,                         // [N, C, L]
    const double* statistics_mean,           // [C]
    const double* statistics_var,            // [C]
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    long long activation,                    // 0: none, 1: ReLU
    const mask_t* mask,                      // as bn_normalize left it, or null
    double inv_count,                        // 1 / count in training; 0: the statistics are constants
    // outputs
    data_t* dx,                              // [N, C, L]
    data_t* dresidual,                       // [N, C, L] or null
    Vector dweight,                          // [C] or null
    Vector dbias,                            // [C] or null
    // sizes
    long long N,
    long long C,
    long long L,
    long long slots_per_row,
    long long slots_per_block) {
    cluster_arrive();
    raw_t* const shared_dy = staging();
    raw_t* const shared_x = shared_dy + slots_per_block;
    const Slots own(N, C, L, slots_per_row, slots_per_block);
    stage(shared_dy, dy, own, N * C * L);
    stage(shared_x, x, own, N * C * L);
    const index_t c = own.channel();
    __shared__ Channel channel;
    if (threadIdx.x == 0) channel = make_channel(statistics_mean[c], statistics_var[c], eps, weight, bias, c);
    __syncthreads();
    staged();

    if (activation) stop(shared_dy, shared_x, own, mask, packs_of(N, C, L), channel);
    double sums[2] = {0, 0};
    const Factors<acc_t> factors(channel);
    for (Slots slots = own; slots.more(); slots.next()) {
        const Slot slot[1] = {slots.slot()};
        if (slot[0].empty()) continue;
        const raw_t g[1] = {shared_dy[slots.place()]}, values[1] = {shared_x[slots.place()]};
        const Passed all[1] = {Passed(false, nullptr)};
        if (channel.wide || !add_chunk(g, values, slot, all, factors, sums))
            add_chunk(g, values, slot, all, Factors<double>(channel), sums);
    }
    block_sum(sums);
    cluster_sum(sums);
    if (threadIdx.x == 0) {
        sums[1] = unscaled(sums[1]) - channel.rest * channel.rstd * sums[0];
        set_gradient(channel, sums[0], sums[1], inv_count);
        if (cluster_rank() == 0) {
            if (dbias) dbias.set(c, sums[0]);
            if (dweight) dweight.set(c, sums[1]);
        }
    }
    __syncthreads();

    with_factors(channel, [&](const auto& after) {
        for (Slots slots = own; slots.more(); slots.next()) {
            const Slot slot = slots.slot();
            if (slot.empty()) continue;
            raw_t g = shared_dy[slots.place()];
            store(dx, slot, input_gradient(g, shared_x[slots.place()], Passed(false, nullptr), inv_count == 0, after));
            if (dresidual) store(dresidual, slot, g);
        }
    });
}
