// The way back through the packs of a thread, in either layout: the input's gradient, and what the sums have in common.
//
// `Source` is where they are read (batches.cuh), `Packs` which ones they are, `Left` what is left of them (packs.cuh,
// columns.cuh), `Channels` what is known of the channels of their elements (elementwise.cuh).
#pragma once
#include "batches.cuh"
#include "elementwise.cuh"
#include "mask.cuh"

// What ReLU passed of the packs of a thread: the gate is the same for all of them.
struct Passed {
    Gate gate;
    const passed_t* record;

    // The record's bits of the pack at this place.
    DEVICE unsigned bits(index_t at) const { return gate == RECORD ? record[at / WIDTH] : 0; }
};

// Turns the sums that sum_all has taken into sum(dy) and sum(dy * xhat): without PRODUCT_SCALE, and about the mean
// itself, not about the center. Where a mask has left nothing they stay 0, whatever the channel is.
DEVICE void finish_sums(double (&sums)[2], const Channel& channel) {
    if (MASKED && sums[0] == 0 && sums[1] == 0) return;
    sums[1] = unscaled(sums[1]) - channel.rest * channel.rstd * sums[0];
}

// inv_count, divided by the number of values that a mask has left of the batch, where only the device knows it.
DEVICE double over_left(double inv_count, const Statistics& statistics) {
    return MASKED && statistics.count_left ? inv_count / (*statistics.count_left < 1 ? 1 : *statistics.count_left)
                                           : inv_count;
}

// Writes the gradients of a thread's packs.
template <bool WIDE, int AT_ONCE, class Source, class Packs, class Left, class Channels>
DEVICE void input_gradients(const Source& dy, const Source& x, Packs packs, const Left& left, const Passed& passed,
                            Dependence dependence, const Channels& channels, const Gradients& gradients) {
    in_batches<AT_ONCE>(packs.count, [&](auto full, int i, int count) {
        raw_t raw_dy[AT_ONCE], raw_x[AT_ONCE];
        index_t at[AT_ONCE];
        unsigned bits[AT_ONCE], some[AT_ONCE];
        each<AT_ONCE>(full, count, [&](int u) {
            at[u] = packs.next();
            raw_dy[u] = dy.get(at[u], i + u);
            raw_x[u] = x.get(at[u], i + u);
            bits[u] = passed.bits(at[u]);
            some[u] = left.bits(i + u);
        });
        each<AT_ONCE>(full, count, [&](int u) {
            acc_t g[WIDTH];
            store(gradients.dx + at[u],
                  input_gradient<WIDE>(raw_dy[u], raw_x[u], passed.gate, bits[u], some[u], dependence, channels, g));
            if (gradients.dresidual) store(gradients.dresidual + at[u], pack(g));
        });
    });
}

// Writes the gradients of a thread's packs, whatever is asked for: every choice is made here, once. `constant` if the
// statistics do not depend on x; else they are those of channels.
template <class Source, class Packs, class Left, class Channels>
DEVICE void input_gradients_all(const Source& dy, const Source& x, const Packs& packs, const Left& left,
                                const Epilogue& epilogue, bool constant, const Channels& channels,
                                const Gradients& gradients) {
    const passed_t* const record = epilogue.passed;
    if (sizeof(acc_t) < 8 && channels.any_wide)
        input_gradients<true, 1>(dy, x, packs, left, {gate_of(epilogue), record}, constant ? CONSTANTS : OF_CHANNEL,
                                 channels, gradients);
    else
        with_gate(epilogue, [&](auto gate) {
            with_flag(constant, [&](auto unchanging) {
                constexpr Dependence DEPENDENCE = decltype(unchanging)::value ? CONSTANTS : OF_CHANNEL;
                input_gradients<false, Packs::PAIRS>(dy, x, packs, left, {gate, record}, DEPENDENCE, channels,
                                                     gradients);
            });
        });
}
