// Channels first: what is done to the packs of a thread on the way forward.
#pragma once
#include "packs.cuh"

constexpr int LOADS = PACK_BYTES < 8 ? 8 : 4;  // packs of an array in flight

// Normalizes the packs of a thread; x tells where they are. AT_ONCE of them are in flight.
template <bool WIDE, int AT_ONCE, class Source>
DEVICE void normalize_packs(const Source& x, Packs packs, const data_t* residual, const Flags& flags,
                            const OneChannel& channel, data_t* out, mask_t* mask) {
    in_batches<AT_ONCE>(packs, [&](auto full, int i, int count) {
        raw_t raw[AT_ONCE], added[AT_ONCE];
        index_t at[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++)
            if (full || u < count) {
                at[u] = packs.next();
                raw[u] = x.get(at[u], i + u);
                if (flags.residual) added[u] = load(residual + at[u]);
            }
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++)
            if (full || u < count) {
                unsigned bits;
                store(out + at[u], normalize<WIDE>(raw[u], added[u], flags, channel, bits));
                if (flags.residual && flags.relu && mask) mask[at[u] / WIDTH] = (mask_t)bits;
            }
    });
}

// The same, whatever is asked for: all choices are made here.
template <class Source>
DEVICE void normalize_all(const Source& x, const Packs& packs, const data_t* residual, bool relu, const Channel& channel,
                          data_t* out, mask_t* mask) {
    const OneChannel own(channel);
    if (sizeof(acc_t) < 8 && channel.wide)
        normalize_packs<true, 1>(x, packs, residual, {residual != nullptr, relu}, own, out, mask);
    else
        with_flag(residual, [&](auto given) {
            with_flag(relu, [&](auto rectified) {
                normalize_packs<false, decltype(given)::value ? LOADS / 2 : LOADS>(x, packs, residual, {given, rectified}, own, out, mask);
            });
        });
}
