// The way back of second order, in either layout: its gradients, and what the sums have in common.
//
// First order maps dy, x and weight to dx, dweight, dbias and dresidual. Second order takes a cotangent for each of
// these, cdx, cdweight, cdbias and cdresidual, and gives gradients of dy, x and weight. With the five sums
//     A = sum(dy)   B = sum(dy * xhat)   U = sum(cdx)   V = sum(cdx * xhat)   W = sum(cdx * dy)
// over what activation passed of dy, n = count, and scale = weight * rstd, they are
//     ddy     = (cdx - U / n - xhat * V / n) * scale + xhat * cdweight + cdbias + cdresidual, where activation passed
//     dweight = Q * rstd                                     Q = W - (A * U + B * V) / n
//     dx      = (cdx * a + dy * b - (a * U + b * A) / n - xhat * (a * V + b * B + Q * scale) / n) * rstd
//                                                            a = -scale * B / n,  b = cdweight - scale * V / n
// In eval mode, whose statistics are constants, 1 / n is 0 everywhere. So elementwise both are linear,
//     ddy = cdx * scale + (x - center) * slope + offset + cdresidual
//     dx  = cdx * of_cdx + dy * slope + (x - center) * of_x + added
// with factors of the channel: slope is the same in both, as a mixed derivative.
#pragma once
#include "batches.cuh"
#include "gradients.cuh"

// Elements of a byte of the record: those of a pack, unless packs are halves of those that the record was made for.
#ifndef RECORDED
#define RECORDED WIDTH
#endif

// What ReLU passed of the packs of a thread, as `Passed`.
struct SecondPassed {
    Gate gate;
    const passed_t* record;

    DEVICE unsigned bits(index_t at) const {
        return gate == RECORD ? record[at / RECORDED] >> (RECORDED > WIDTH ? at % RECORDED : 0) : 0;
    }
};

constexpr int SECOND_SUMS = 5;  // the sums of second order, in the order of the struct SecondSums

// Turns the sums of a team or tile into those of `SecondSums`: without PRODUCT_SCALE, and about the mean itself.
DEVICE void finish_second_sums(double (&sums)[SECOND_SUMS], const Channel& channel) {
    const double off = channel.rest * channel.rstd;
    sums[1] = unscaled(sums[1]) - off * sums[0];
    sums[3] = unscaled(sums[3]) - off * sums[2];
    sums[4] = unscaled(sums[4]);
}

// Writes sums to their place in those of all parts and channels.
DEVICE void set_second_sums(const SecondSums& sums, long long at, const double (&own)[SECOND_SUMS]) {
    sums.dy[at] = own[0];
    sums.dy_xhat[at] = own[1];
    sums.cdx[at] = own[2];
    sums.cdx_xhat[at] = own[3];
    sums.cdx_dy[at] = own[4];
}

// Adds the sums in place `at` of all parts and channels to those of a thread.
DEVICE void add_second_sums(const SecondSums& sums, long long at, double (&own)[SECOND_SUMS]) {
    own[0] += sums.dy[at];
    own[1] += sums.dy_xhat[at];
    own[2] += sums.cdx[at];
    own[3] += sums.cdx_xhat[at];
    own[4] += sums.cdx_dy[at];
}

// Adds what an element contributes to the five sums, in the dtype A. rstd is given times PRODUCT_SCALE.
template <class A>
DEVICE void add_second_products(acc_t dy, acc_t cdx, acc_t x, const Factors<A>& f, A rstd, A (&sums)[SECOND_SUMS]) {
    const A xhat = ((A)x - f.center) * rstd;
    sums[0] += (A)dy;
    sums[1] += (A)dy * xhat;
    sums[2] += (A)cdx;
    sums[3] += (A)cdx * xhat;
    sums[4] += (A)cdx * ((A)dy * (A)PRODUCT_SCALE);
}

// Whether the dtype A held sum(cdx * dy), sums[4]: where both are small, float32 may have lost products, though it holds
// each of them. Where all of dy or all of cdx is 0, nothing was lost: so are its two other sums then.
template <class A>
DEVICE bool held_products(const double (&sums)[SECOND_SUMS]) {
    const bool nothing = (sums[0] == 0 && sums[1] == 0) || (sums[2] == 0 && sums[3] == 0);
    return sizeof(A) == 8 || nothing || fabs(sums[4]) > 1e-24;
}

// Factors of dx in second order that first order does not have, in the dtype A.
template <class A>
struct SecondFactors {
    A of_cdx, of_x, added;
};
template <class A>
DEVICE SecondFactors<A> in_dtype(const SecondFactors<double>& factors) {
    return {(A)factors.of_cdx, (A)factors.of_x, (A)factors.added};
}

// Sets slope and offset of a channel, and the factors, from its five sums. Returns dweight. Where nothing depends on
// weight, as there is no cdx, or on x and its statistics, they may be NaN.
DEVICE double set_second_gradient(Channel& channel, SecondFactors<double>& factors, const double (&sums)[SECOND_SUMS],
                                  double inv_count, const Incoming& incoming, Gate gate, long long c) {
    const bool of_weight = incoming.cdx, of_x = incoming.cdweight || (of_weight && inv_count != 0);
    const double scale = of_weight ? channel.scale : 0;
    if (gate != INPUT) channel.scale = scale;  // else ReLU wants it as it is
    double of_dy = incoming.cdweight ? incoming.cdweight.get(c) : 0, q = of_weight ? sums[4] : 0;  // b and Q above
    channel.offset = incoming.cdbias ? incoming.cdbias.get(c) : 0;
    factors = {0, 0, 0};
    if (of_x && inv_count != 0) {  // else sums may be inf
        const double of_cdx = -scale * sums[1] * inv_count;
        of_dy -= scale * sums[3] * inv_count;
        if (of_weight) q -= (sums[0] * sums[2] + sums[1] * sums[3]) * inv_count;
        const double along = of_cdx * sums[3] + of_dy * sums[1] + scale * q;
        factors.of_cdx = of_cdx * channel.rstd;
        factors.of_x = -along * inv_count * channel.rstd * channel.rstd;
        factors.added = -(of_cdx * sums[2] + of_dy * sums[0]) * inv_count * channel.rstd;
        channel.offset -= scale * sums[2] * inv_count;
    }
    channel.slope = of_x ? of_dy * channel.rstd : 0;
    if (channel.rest != 0) {  // 0 * inf is NaN
        channel.offset -= channel.slope * channel.rest;
        factors.added -= factors.of_x * channel.rest;
    }
    channel.wide = channel.wide || extreme(channel.slope) || extreme(channel.offset) || extreme(factors.of_cdx) ||
                   extreme(factors.of_x) || extreme(factors.added);
    return of_weight ? q * channel.rstd : 0;
}

// An element of the arrays that come in.
template <class A>
struct SecondElement {
    A dy, x, cdx, cdresidual;
};

// Gradients of an element: of dy, as if activation passed it, and of x. `constant` if the statistics do not depend on x.
// It is said which products are rounded: the bits of a channel must not depend on what code a wide one beside it takes.
template <class A>
DEVICE void second_gradients(const SecondElement<A>& at, const Factors<A>& f, const SecondFactors<A>& second,
                             bool constant, A& ddy, A& dx) {
    const A d = at.x - f.center;
    ddy = multiply_add(at.cdx, f.scale, f.offset);
    if (constant) {
        const bool depends = f.slope != 0;  // else without 0 * x: x may be inf
        ddy += depends ? mul(d, f.slope) : 0;
        dx = depends ? mul(at.dy, f.slope) : 0;
    } else {
        ddy = multiply_add(d, f.slope, ddy);
        dx = multiply_add(at.cdx, second.of_cdx, second.added);
        dx = multiply_add(d, second.of_x, multiply_add(at.dy, f.slope, dx));
    }
    ddy += at.cdresidual;
}

// Packs of the arrays that come in, at one place.
struct SecondPacks {
    raw_t dy, x, cdx, cdresidual;

    DEVICE SecondPacks() {}
    DEVICE SecondPacks(const Incoming& incoming, const data_t* x, index_t at)
        : dy(load(incoming.dy + at)), x(load(x + at)), cdx(incoming.cdx ? load(incoming.cdx + at) : raw_t()),
          cdresidual(incoming.cdresidual ? load(incoming.cdresidual + at) : raw_t()) {}
};

// Gradients of a pack. `Seconds` are to SecondFactors what `Channels` are to Factors.
template <bool WIDE, class Channels, class Seconds>
DEVICE void second_gradients(const SecondPacks& packs, Gate gate, unsigned bits, bool constant,
                             const Channels& channels, const Seconds& seconds, raw_t& ddy, raw_t& dx) {
    acc_t dy[WIDTH], x[WIDTH], cdx[WIDTH], cdresidual[WIDTH];
    typename Arithmetic<WIDE>::type of_dy[WIDTH], of_x[WIDTH];
    unpack(packs.dy, dy);
    unpack(packs.x, x);
    unpack(packs.cdx, cdx);
    unpack(packs.cdresidual, cdresidual);
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        const bool passed = passes<WIDE>(x[e], e, gate, bits, channels);
        if (!passed) dy[e] = 0;
        if (WIDE && channels.is_wide(e)) {
            double precise_ddy, precise_dx;
            second_gradients<double>({dy[e], x[e], cdx[e], cdresidual[e]}, channels.wide(e), seconds.wide(e), constant,
                                     precise_ddy, precise_dx);
            of_dy[e] = precise_ddy;
            of_x[e] = precise_dx;
        } else {
            acc_t usual_ddy, usual_dx;
            second_gradients<acc_t>({dy[e], x[e], cdx[e], cdresidual[e]}, channels.usual(e), seconds.usual(e), constant,
                                    usual_ddy, usual_dx);
            of_dy[e] = usual_ddy;
            of_x[e] = usual_dx;
        }
        if (!passed) of_dy[e] = 0;
    }
    ddy = pack(of_dy);
    dx = pack(of_x);
}

// Writes the gradients of a thread's packs, of which AT_ONCE are in flight.
template <bool WIDE, int AT_ONCE, class Packs, class Channels, class Seconds>
DEVICE void second_gradients(const Incoming& incoming, const data_t* x, Packs packs, const SecondPassed& passed,
                             bool constant, const Channels& channels, const Seconds& seconds,
                             const SecondGradients& gradients) {
    in_batches<AT_ONCE>(packs.count, [&](auto full, int, int count) {
        SecondPacks in[AT_ONCE];
        index_t at[AT_ONCE];
        unsigned bits[AT_ONCE];
        each<AT_ONCE>(full, count, [&](int u) {
            at[u] = packs.next();
            in[u] = SecondPacks(incoming, x, at[u]);
            bits[u] = passed.bits(at[u]);
        });
        each<AT_ONCE>(full, count, [&](int u) {
            raw_t ddy, dx;
            second_gradients<WIDE>(in[u], passed.gate, bits[u], constant, channels, seconds, ddy, dx);
            store(gradients.ddy + at[u], ddy);
            store(gradients.dx + at[u], dx);
        });
    });
}

// Writes the gradients of a thread's packs, whatever is asked for: every choice is made here, once.
template <class Packs, class Channels, class Seconds>
DEVICE void second_gradients_all(const Incoming& incoming, const data_t* x, const Packs& packs,
                                 const Epilogue& epilogue, bool constant, const Channels& channels,
                                 const Seconds& seconds, const SecondGradients& gradients) {
    if (sizeof(acc_t) < 8 && channels.any_wide)
        second_gradients<true, 1>(incoming, x, packs, {gate_of(epilogue), epilogue.passed}, constant, channels, seconds,
                                  gradients);
    else
        with_gate(epilogue, [&](auto gate) {
            constexpr int AT_ONCE = Packs::PAIRS / 2;  // packs of all arrays in flight
            with_flag(constant, [&](auto unchanging) {
                second_gradients<false, AT_ONCE>(incoming, x, packs, {gate, epilogue.passed}, unchanging, channels,
                                                 seconds, gradients);
            });
        });
}
