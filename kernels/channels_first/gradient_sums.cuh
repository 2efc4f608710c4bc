// Channels first: the sums of dy and of dy * xhat, over the packs of a thread.
#pragma once
#include "../gradients.cuh"
#include "packs.cuh"

// Packs whose sums are taken in float32 before they go on in float64.
constexpr int SUMMED = PACK_BYTES < 8 ? 8 : 4;

// Takes two sums over a thread's packs, in the dtype A for each batch of AT_ONCE packs: sums[0] = sum(dy) and
// sums[1] = PRODUCT_SCALE * sum(dy * (x - center) * rstd). WIDE is whether what ReLU passed is worked out in float64.
// Returns whether the dtype A held the sums.
template <class A, bool WIDE, int AT_ONCE, class Source>
DEVICE bool sum_packs(const Source& dy, const Source& x, Packs packs, const Left& left, const Passed& passed,
                      const OneChannel& channel, double (&sums)[2]) {
    constexpr int SUMS = sizeof(A) == 8 ? 1 : WIDTH < 4 ? WIDTH : 4;  // side by side: few roundings for each
    const Factors<A> f(*channel.channel);
    const A rstd = f.rstd * (A)PRODUCT_SCALE;
    bool all_held = true;
    sums[0] = sums[1] = 0;
    as_they_come<AT_ONCE>(x, packs.count, [&](auto full, int i, int count) {
        A sum_dy[SUMS] = {}, sum_dy_xhat[SUMS] = {};
        constexpr int IN_FLIGHT = AT_ONCE < Packs::PAIRS ? AT_ONCE : Packs::PAIRS;
#pragma unroll
        for (int first = 0; first < AT_ONCE; first += IN_FLIGHT) {
            raw_t raw_dy[IN_FLIGHT], raw_x[IN_FLIGHT];
            unsigned bits[IN_FLIGHT], some[IN_FLIGHT];
#pragma unroll
            for (int u = 0; u < IN_FLIGHT; u++)
                if (full || first + u < count) {
                    const index_t at = packs.next();
                    raw_dy[u] = dy.get(at, i + first + u);
                    raw_x[u] = x.get(at, i + first + u);
                    bits[u] = passed.bits(at);
                    some[u] = left.bits(i + first + u);
                }
#pragma unroll
            for (int u = 0; u < IN_FLIGHT; u++)
                if (full || first + u < count) {
                    acc_t g[WIDTH], in[WIDTH];
                    unpack(raw_dy[u], g);
                    unpack(raw_x[u], in);
                    stop<WIDE>(g, in, passed.gate, bits[u], channel);
                    if (passed.gate != OPEN) dy.put(pack(g), i + first + u);
#pragma unroll
                    for (int e = 0; e < WIDTH; e++)
                        if (some[u] >> e & 1)  // of what a mask leaves out, x may be NaN
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

// Takes the sums over a thread's packs, whatever is asked for: every choice is made here, once.
template <class Source>
DEVICE void sum_all(const Source& dy, const Source& x, const Packs& packs, const Left& left, const Epilogue& epilogue,
                    const OneChannel& channel, double (&sums)[2]) {
    bool all_held = false;
    if (sizeof(acc_t) == 8 || !channel.any_wide)
        with_gate(epilogue, [&](auto gate) {
            all_held = sum_packs<acc_t, false, SUMMED>(dy, x, packs, left, {gate, epilogue.passed}, channel, sums);
        });
    if (sizeof(acc_t) < 8 && !all_held)
        sum_packs<double, true, 1>(dy, x, packs, left, {gate_of(epilogue), epilogue.passed}, channel, sums);
}
