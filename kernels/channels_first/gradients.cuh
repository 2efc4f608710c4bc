// Channels first: what is done to the packs of a thread on the way back.
#pragma once
#include "packs.cuh"

constexpr int LOADS = PACK_BYTES < 8 ? 4 : 2;    // packs of each array in flight
constexpr int SUMMED = PACK_BYTES < 8 ? 8 : 4;   // packs whose sums are taken in float32 before they go on in float64

// What belongs to a gradient and does not change from pack to pack.
struct Backward {
    Gate gate;
    const mask_t* mask;

    DEVICE unsigned bits(index_t at) const { return gate == MASK ? mask[at / WIDTH] : 0; }
};

// Sums of dy and dy * xhat over a thread's packs, in the dtype A. Returns whether it held them. WIDE: what ReLU passed is told
// by float64. AT_ONCE packs of both arrays are in flight.
template <class A, bool WIDE, int AT_ONCE, class Source>
DEVICE bool sum_packs(const Source& dy, const Source& x, Packs packs, const Backward& backward, const OneChannel& channel,
                      double (&sums)[2]) {
    constexpr int SUMS = sizeof(A) == 8 ? 1 : WIDTH < 4 ? WIDTH : 4;  // side by side: few roundings for each
    const Factors<A> f(*channel.channel);
    const A rstd = f.rstd * (A)PRODUCT_SCALE;
    bool all_held = true;
    sums[0] = sums[1] = 0;
    as_they_come<AT_ONCE>(x, packs, [&](auto full, int i, int count) {
        A sum_dy[SUMS] = {}, sum_dy_xhat[SUMS] = {};
        constexpr int IN_FLIGHT = AT_ONCE < LOADS ? AT_ONCE : LOADS;
#pragma unroll
        for (int first = 0; first < AT_ONCE; first += IN_FLIGHT) {
            raw_t raw_dy[IN_FLIGHT], raw_x[IN_FLIGHT];
            unsigned bits[IN_FLIGHT];
#pragma unroll
            for (int u = 0; u < IN_FLIGHT; u++)
                if (full || first + u < count) {
                    const index_t at = packs.next();
                    raw_dy[u] = dy.get(at, i + first + u);
                    raw_x[u] = x.get(at, i + first + u);
                    bits[u] = backward.bits(at);
                }
#pragma unroll
            for (int u = 0; u < IN_FLIGHT; u++)
                if (full || first + u < count) {
                    acc_t g[WIDTH], in[WIDTH];
                    unpack(raw_dy[u], g);
                    unpack(raw_x[u], in);
                    stop<WIDE>(g, in, backward.gate, bits[u], channel);
                    if (backward.gate != OPEN) dy.put(pack(g), i + first + u);
#pragma unroll
                    for (int e = 0; e < WIDTH; e++)
                        add_products<A>(g[e], in[e], f, rstd, sum_dy[e % SUMS], sum_dy_xhat[e % SUMS]);
                }
        }
        const A of_dy = sum_pairs(sum_dy), of_dy_xhat = sum_pairs(sum_dy_xhat);
        all_held = all_held && held(of_dy) && held(of_dy_xhat);
        sums[0] += of_dy;
        sums[1] += of_dy_xhat;
    });
    return all_held;
}

// The same, whatever is asked for: all choices are made here.
template <class Source>
DEVICE void sum_all(const Source& dy, const Source& x, const Packs& packs, Gate gate, const mask_t* mask,
                    const Channel& channel, double (&sums)[2]) {
    const OneChannel own(channel);
    bool all_held = false;
    if (sizeof(acc_t) == 8 || !channel.wide)
        with_gate(gate, [&](auto known) {
            all_held = sum_packs<acc_t, false, SUMMED>(dy, x, packs, {known, mask}, own, sums);
        });
    if (sizeof(acc_t) < 8 && !all_held) sum_packs<double, true, 1>(dy, x, packs, {gate, mask}, own, sums);
}

// The gradients of a thread's packs.
template <bool WIDE, int AT_ONCE, class Source>
DEVICE void input_gradients(const Source& dy, const Source& x, Packs packs, const Backward& backward, bool constant,
                            const OneChannel& channel, data_t* dx, data_t* dresidual) {
    in_batches<AT_ONCE>(packs, [&](auto full, int i, int count) {
        raw_t g[AT_ONCE], raw[AT_ONCE];
        index_t at[AT_ONCE];
        unsigned bits[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++)
            if (full || u < count) {
                at[u] = packs.next();
                g[u] = dy.get(at[u], i + u);
                raw[u] = x.get(at[u], i + u);
                bits[u] = backward.bits(at[u]);
            }
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++)
            if (full || u < count) {
                acc_t passed[WIDTH];
                store(dx + at[u], input_gradient<WIDE>(g[u], raw[u], backward.gate, bits[u], constant, channel, passed));
                if (dresidual) store(dresidual + at[u], pack(passed));
            }
    });
}

template <class Source>
DEVICE void input_gradients_all(const Source& dy, const Source& x, const Packs& packs, Gate gate, const mask_t* mask,
                                bool constant, const Channel& channel, data_t* dx, data_t* dresidual) {
    const OneChannel own(channel);
    if (sizeof(acc_t) < 8 && channel.wide)
        input_gradients<true, 1>(dy, x, packs, {gate, mask}, constant, own, dx, dresidual);
    else
        with_gate(gate, [&](auto known) {
            with_flag(constant, [&](auto unchanging) {
                input_gradients<false, LOADS>(dy, x, packs, {known, mask}, unchanging, own, dx, dresidual);
            });
        });
}
