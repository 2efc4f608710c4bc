// bn_forward: batch norm in training, out = activation((x - mean) * rstd * weight + bias + residual), and the running
// statistics follow
//
// Each channel is read once. Cluster c takes channel c, which fits into the shared memory of its blocks; each thread keeps
// some of the slots. It takes their mean, then the squares of deviations from it; then the threads of a block merge, and
// the blocks of the cluster, all in the same order.
// Mirror: numpy_ops.bn_forward
#include "../running.cuh"
#include "slots.cuh"

constexpr int LOADS = 2;  // of the residual, in flight

// Adds deviations from a pivot, its first element, over those elements of a pack that it has.
template <class A, class Elements>
DEVICE double sum_about_first(const raw_t& raw, const Elements& elements, A& pivot) {
    A d[WIDTH];
#pragma unroll
    for (int e = WIDTH - 1; e >= 0; e--)
        if (elements.has(e)) pivot = element(raw, e);
#pragma unroll
    for (int e = 0; e < WIDTH; e++) d[e] = elements.has(e) ? element(raw, e) - pivot : 0;
    return sum_pairs(d);
}

// Adds deviations from center + rest, and their squares.
template <class A, class Elements>
DEVICE void add_squares(const raw_t& raw, const Elements& elements, A center, A rest, double& sum_d, double& sum_dd) {
    A d[WIDTH], dd[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        d[e] = elements.has(e) ? (element(raw, e) - center) - rest : 0;
        dd[e] = d[e] * d[e];
    }
    sum_d += sum_pairs(d);
    sum_dd += sum_pairs(dd);
}

// The moments of the slots of a thread, in the dtype A.
template <class A>
DEVICE Moments slot_moments(const raw_t* shared, const Slots& own, bool& exact) {
    int count = 0;
    double base = 0, sum = 0;  // of deviations from base
    for (Slots slots = own; slots.more(); slots.next()) {
        const Slot slot = slots.slot();
        if (slot.empty()) continue;
        const raw_t raw = shared[slots.place()];
        A pivot = 0;
        const double part = slot.whole() ? sum_about_first(raw, AllElements(), pivot) : sum_about_first(raw, slot, pivot);
        if (count == 0) base = pivot;
        count += slot.hi - slot.lo;
        sum += part + (slot.hi - slot.lo) * (pivot - base);
    }
    const double inv_count = count > 0 ? 1.0 / count : 0, mean = base + sum * inv_count;
    const A center = (A)mean, rest = (A)(mean - center);
    double sum_d = 0, sum_dd = 0;
    for (Slots slots = own; slots.more(); slots.next()) {
        const Slot slot = slots.slot();
        if (slot.empty()) continue;
        const raw_t raw = shared[slots.place()];
        if (slot.whole())
            add_squares(raw, AllElements(), center, rest, sum_d, sum_dd);
        else
            add_squares(raw, slot, center, rest, sum_d, sum_dd);
    }
    exact = count == 0 || held_squares<A>(sum_dd);
    return from_sums(count, inv_count, mean, 0, sum_d, sum_dd);
}

extern "C" __global__ void CLUSTER LAUNCH_BOUNDS bn_forward(
    const data_t* x,                         // [N, C, L]
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    const data_t* residual,                  // [N, C, L] or null
    long long activation,                    // 0: none, 1: ReLU
    Vector running_mean,                     // [C] or null; updated
    Vector running_var,                      // [C] or null; updated
    double momentum,
    long long* num_batches_tracked,          // [] or null
    // outputs
    data_t* out,                             // [N, C, L]; may be x or residual
    mask_t* mask,                            // as mask_of says, or null: where ReLU passes
    double* statistics_mean,                 // [C] or null
    double* statistics_var,                  // [C] or null
    // sizes
    long long N,
    long long C,
    long long L,
    long long slots_per_row,
    long long slots_per_block) {
    cluster_arrive();
    raw_t* const shared = staging();
    const Slots own(N, C, L, slots_per_row, slots_per_block);
    const index_t c = own.channel(), readable = out == x || out == residual ? 0 : N * C * L;
    stage(shared, x, own, readable);
    staged();

    bool exact;
    Moments batch = slot_moments<acc_t>(shared, own, exact);
    if (!exact) batch = slot_moments<double>(shared, own, exact);
    batch = cluster_merge(block_merge(batch));
    __shared__ Channel channel;
    if (threadIdx.x == 0) {
        const double var = batch.m2 / batch.count;
        channel = make_channel(batch.mean, var, eps, weight, bias, c);
        if (cluster_rank() == 0) {
            if (statistics_mean) statistics_mean[c] = batch.mean;
            if (statistics_var) statistics_var[c] = var;
            if (running_mean) update_running(batch, running_mean, running_var, momentum, nullptr, c);
            if (c == 0 && num_batches_tracked) *num_batches_tracked += 1;
        }
    }
    __syncthreads();

    const long long packs = packs_of(N, C, L);
    with_factors(channel, [&](const auto& factors) {
        for (Slots slots = own; slots.more();) {
            raw_t raw[LOADS];
            Residual added[LOADS];
            Slot some[LOADS];
#pragma unroll
            for (int u = 0; u < LOADS; u++) {
                some[u] = {0, 0, 0};
                added[u].given = residual;
                if (!slots.more()) continue;
                some[u] = slots.slot();
                if (!some[u].empty()) raw[u] = shared[slots.place()];
                if (residual) added[u].raw = load(residual, some[u], readable);
                slots.next();
            }
#pragma unroll
            for (int u = 0; u < LOADS; u++)
                if (!some[u].empty())
                    store(out, some[u], normalize(raw[u], added[u], activation, factors, mask_of(mask, some[u], packs)));
        }
    });
}
