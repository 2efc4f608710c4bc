// What is done to the packs of a thread on the way forward, in either layout.
//
// Channels, those of a pack's elements, also tell whether float32 does not reach any of them: any_wide.
#pragma once
#include "batches.cuh"
#include "elementwise.cuh"

// Packs of an array in flight. Each has an index of its own: of two registers, where that has 64 bits.
constexpr int LOADS = sizeof(index_t) == 4 ? (PACK_BYTES < 8 ? 8 : 4) : (PACK_BYTES < 8 ? 4 : 2);

// Normalizes the packs of a thread; x tells where they are. AT_ONCE of them are in flight.
template <bool WIDE, int AT_ONCE, class Source, class Packs, class Channels>
DEVICE void normalize_packs(const Source& x, Packs packs, const data_t* residual, const Flags& flags,
                            const Channels& channels, data_t* out, mask_t* mask) {
    in_batches<AT_ONCE>(packs.count, [&](auto full, int i, int count) {
        raw_t raw[AT_ONCE], added[AT_ONCE];
        index_t at[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            if (!full && u == count) break;
            at[u] = packs.next();
            raw[u] = x.get(at[u], i + u);
            if (flags.residual) added[u] = load(residual + at[u]);
        }
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            if (!full && u == count) break;
            unsigned bits;
            store(out + at[u], normalize<WIDE>(raw[u], added[u], flags, channels, bits));
            if (flags.residual && flags.relu && mask) mask[at[u] / WIDTH] = (mask_t)bits;
        }
    });
}

// The same, whatever is asked for: all choices are made here.
template <class Source, class Packs, class Channels>
DEVICE void normalize_all(const Source& x, const Packs& packs, const data_t* residual, bool relu,
                          const Channels& channels, data_t* out, mask_t* mask) {
    if (sizeof(acc_t) < 8 && channels.any_wide)
        normalize_packs<true, 1>(x, packs, residual, {residual != nullptr, relu}, channels, out, mask);
    else
        with_flag(residual, [&](auto given) {
            constexpr int AT_ONCE = decltype(given)::value ? (LOADS + 1) / 2 : LOADS;  // as many bytes
            with_flag(relu, [&](auto rectified) {
                normalize_packs<false, AT_ONCE>(x, packs, residual, {given, rectified}, channels, out, mask);
            });
        });
}
