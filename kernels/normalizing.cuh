// The way forward through the packs of a thread, in either layout: their output.
//
// `Source` is where they are read (batches.cuh), `Packs` which ones they are, `Left` what is left of them (packs.cuh,
// columns.cuh), `Channels` what is known of the channels of their elements (elementwise.cuh).
#pragma once
#include "batches.cuh"
#include "elementwise.cuh"

// Packs of an array in flight: fewer with 64 bits, as each has an index of its own, which takes two registers then.
constexpr int LOADS = sizeof(index_t) == 4 ? (PACK_BYTES < 8 ? 8 : 4) : (PACK_BYTES < 8 ? 4 : 2);

// Writes the output of a thread's packs, of which AT_ONCE are in flight: they are loaded before any is worked on.
template <bool WIDE, int AT_ONCE, class Source, class Packs, class Left, class Channels>
DEVICE void normalize_packs(const Source& x, Packs packs, const Left& left, const Epilogue& epilogue,
                            const Flags& flags, const Channels& channels, data_t* out) {
    in_batches<AT_ONCE>(packs.count, [&](auto full, int i, int count) {
        raw_t raw[AT_ONCE], added[AT_ONCE];
        index_t at[AT_ONCE];
        unsigned some[AT_ONCE];
        each<AT_ONCE>(full, count, [&](int u) {
            at[u] = packs.next();
            raw[u] = x.get(at[u], i + u);
            some[u] = left.bits(i + u);
            if (flags.residual) added[u] = load(epilogue.residual + at[u]);
        });
        each<AT_ONCE>(full, count, [&](int u) {
            unsigned bits;
            store(out + at[u], normalize<WIDE>(raw[u], added[u], flags, channels, some[u], bits));
            if (flags.residual && flags.relu && epilogue.passed) epilogue.passed[at[u] / WIDTH] = (passed_t)bits;
        });
    });
}

// Writes the output of a thread's packs, whatever is asked for: every choice is made here, once.
template <class Source, class Packs, class Left, class Channels>
DEVICE void normalize_all(const Source& x, const Packs& packs, const Left& left, const Epilogue& epilogue,
                          const Channels& channels, data_t* out) {
    const bool residual = epilogue.residual, relu = epilogue.activation == RELU;
    if (sizeof(acc_t) < 8 && channels.any_wide)
        normalize_packs<true, 1>(x, packs, left, epilogue, {residual, relu}, channels, out);
    else
        with_flag(residual, [&](auto given) {
            constexpr int AT_ONCE = decltype(given)::value ? (LOADS + 1) / 2 : LOADS;  // as many bytes in flight
            with_flag(relu, [&](auto rectified) {
                normalize_packs<false, AT_ONCE>(x, packs, left, epilogue, {given, rectified}, channels, out);
            });
        });
}
