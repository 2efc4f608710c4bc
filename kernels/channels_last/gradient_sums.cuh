// Channels last: the sums of dy and of dy * xhat, over the packs of a thread.
#pragma once
#include "../gradients.cuh"
#include "../moments.cuh"
#include "columns.cuh"

constexpr int SUMMED = 16;                        // rows whose sums are taken in float32 before they go on in float64
constexpr int ROWS = PACK_BYTES < 8 ? 8 : 4;      // rows in flight
typedef double ColumnSums[2 * WIDTH];             // sum(dy) of each channel of a thread, then sum(dy * xhat) of each

// Takes the sums over a thread's packs, with AT_ONCE packs of both arrays in flight. In place of sum(dy * xhat) they
// have PRODUCT_SCALE * sum(dy * (x - center) * rstd). WIDE is whether what ReLU passed is worked out in float64.
// Returns a bit for each element whose sums the dtype of the arithmetic did not hold.
template <bool WIDE, int AT_ONCE, class Source>
DEVICE unsigned sum_packs(const Source& dy, const Source& x, Packs packs, const Left& left, const Passed& passed,
                          const OwnChannels& channels, ColumnSums& sums) {
    acc_t sum_dy[WIDTH] = {}, sum_dy_xhat[WIDTH] = {}, rstd[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        sums[e] = sums[WIDTH + e] = 0;
        rstd[e] = channels.usual(e).rstd * PRODUCT_SCALE;
    }
    const auto flush = [&] {
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            sums[e] += sum_dy[e];
            sums[WIDTH + e] += sum_dy_xhat[e];
            sum_dy[e] = sum_dy_xhat[e] = 0;
        }
    };
    as_they_come<AT_ONCE>(x, packs.count, [&](auto full, int i, int count) {
        raw_t raw_dy[AT_ONCE], raw_x[AT_ONCE];
        unsigned bits[AT_ONCE], some[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const bool there = full || u < count;
            const index_t at = there ? packs.next() : 0;
            raw_dy[u] = there ? dy.get(at, i + u) : raw_t();  // dy of 0 adds nothing, or NaN that float32 finds
            raw_x[u] = there ? x.get(at, i + u) : raw_x[0];
            bits[u] = there ? passed.bits(at) : 0;
            some[u] = there || !MASKED ? left.bits(i + u) : 0;  // x of pack 0 may be NaN that is left out
        }
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            acc_t g[WIDTH], in[WIDTH];
            unpack(raw_dy[u], g);
            unpack(raw_x[u], in);
            stop<WIDE>(g, in, passed.gate, bits[u], channels);
            if (passed.gate != OPEN && (full || u < count)) dy.put(pack(g), i + u);
#pragma unroll
            for (int e = 0; e < WIDTH; e++)
                if ((full || u < count || sizeof(acc_t) < 8) && some[u] & 1)  // what is left out may be NaN
                    add_products<acc_t>(g[e], in[e], channels.usual(e), rstd[e], sum_dy[e], sum_dy_xhat[e]);
        }
        if (full && (i + AT_ONCE) % SUMMED == 0) flush();
    });
    flush();
    unsigned missed = 0;
#pragma unroll
    for (int e = 0; e < WIDTH; e++)  // a float32 that was too large has left inf or NaN
        if (!(sums[e] - sums[e] == 0) || !(sums[WIDTH + e] - sums[WIDTH + e] == 0)) missed |= 1u << e;
    return missed;
}

// Takes the sums of element e alone, in float64.
template <class Source>
DEVICE void sum_exactly(const Source& dy, const Source& x, Packs packs, const Left& left, const Passed& passed,
                        const OwnChannels& channels, int e, double& sum_dy, double& sum_dy_xhat) {
    const Factors<double> f = channels.wide(e);
    const double rstd = f.rstd * PRODUCT_SCALE;
    sum_dy = sum_dy_xhat = 0;
#pragma unroll 1
    for (int i = 0; i < packs.count; i++) {
        const index_t at = packs.next();
        acc_t g[WIDTH], in[WIDTH];
        unpack(dy.get(at, i), g);
        unpack(x.get(at, i), in);
        if (!(left.bits(i) & 1)) continue;
        stop<true>(g, in, passed.gate, passed.bits(at), channels);
        add_products<double>(g[e], in[e], f, rstd, sum_dy, sum_dy_xhat);
    }
}

// Takes the sums over a thread's packs, whatever is asked for: every choice is made here, once.
template <class Source>
DEVICE void sum_all(const Source& dy, const Source& x, const Packs& packs, const Left& left, const Epilogue& epilogue,
                    const OwnChannels& channels, ColumnSums& sums) {
    const Passed passed = {gate_of(epilogue), epilogue.passed};
    unsigned missed = 0;
    if (sizeof(acc_t) < 8 && channels.any_wide)
        missed = sum_packs<true, 1>(dy, x, packs, left, passed, channels, sums);
    else
        with_gate(epilogue, [&](auto gate) {
            // Packs in flight, where they have many elements: more from memory, which is far; fewer with gates
            // or masks, which want registers as well.
            constexpr bool OPENED = decltype(gate)::value == OPEN;
            constexpr int FEW = (Source::FAR && !MASKED ? 4 : 2) / (OPENED ? 1 : 2);
            missed = sum_packs<false, WIDTH == 8 ? FEW : ROWS>(dy, x, packs, left, {gate, epilogue.passed}, channels,
                                                               sums);
        });
    if constexpr (sizeof(acc_t) < 8) {
        if (!missed && !channels.any_wide) return;
#pragma unroll
        for (int e = 0; e < WIDTH; e++)  // each channel by itself: no other one is touched
            if (missed >> e & 1 || (channels.any_wide && channels.is_wide(e)))
                sum_exactly(dy, x, packs, left, passed, channels, e, sums[e], sums[WIDTH + e]);
    }
}
