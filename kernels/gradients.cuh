// The input's gradient of the packs of a thread, in either layout.
//
// Channels, those of a pack's elements, also tell whether float32 does not reach any of them: any_wide.
#pragma once
#include "batches.cuh"
#include "elementwise.cuh"

// How to know what ReLU passed of the packs of a thread: the same for all of them. bits: those of the mask, of one pack.
struct Backward {
    Gate gate;
    const mask_t* mask;

    DEVICE unsigned bits(index_t at) const { return gate == MASK ? mask[at / WIDTH] : 0; }
};

// The gradients of a thread's packs.
template <bool WIDE, int AT_ONCE, class Source, class Packs, class Channels>
DEVICE void input_gradients(const Source& dy, const Source& x, Packs packs, const Backward& backward, bool constant,
                            const Channels& channels, data_t* dx, data_t* dresidual) {
    in_batches<AT_ONCE>(packs.count, [&](auto full, int i, int count) {
        raw_t g[AT_ONCE], raw[AT_ONCE];
        index_t at[AT_ONCE];
        unsigned bits[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            if (!full && u == count) break;
            at[u] = packs.next();
            g[u] = dy.get(at[u], i + u);
            raw[u] = x.get(at[u], i + u);
            bits[u] = backward.bits(at[u]);
        }
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            if (!full && u == count) break;
            acc_t passed[WIDTH];
            store(dx + at[u], input_gradient<WIDE>(g[u], raw[u], backward.gate, bits[u], constant, channels, passed));
            if (dresidual) store(dresidual + at[u], pack(passed));
        }
    });
}

// The same, whatever is asked for: all choices are made here.
template <class Source, class Packs, class Channels>
DEVICE void input_gradients_all(const Source& dy, const Source& x, const Packs& packs, Gate gate, const mask_t* mask,
                                bool constant, const Channels& channels, data_t* dx, data_t* dresidual) {
    if (sizeof(acc_t) < 8 && channels.any_wide)
        input_gradients<true, 1>(dy, x, packs, {gate, mask}, constant, channels, dx, dresidual);
    else
        with_gate(gate, [&](auto known) {
            constexpr int AT_ONCE = Packs::pairs(decltype(known)::value);
            with_flag(constant, [&](auto unchanging) {
                input_gradients<false, AT_ONCE>(dy, x, packs, {known, mask}, unchanging, channels, dx, dresidual);
            });
        });
}
