// Batch norm of one channel: what depends on the channel alone, in float64.
//
// The mean is never rounded to one float32. With center the mean so rounded and rest = mean - center,
//     (x - mean) * scale + bias  =  (x - center) * scale + (bias - rest * scale),
// where the second bracket, shift, is a constant of the channel.
// Mirror: channels.Channels
#pragma once
#include "bundles.cuh"

struct Channel {
    double center, rest, rstd, scale, shift;  // rstd = 1 / sqrt(var + eps), scale = rstd * weight
    double slope, offset;  // factors of the input's gradient: see set_gradient
    bool wide;             // whether float32 is too narrow: the channel's numbers are near its limits
    bool gate_wide;        // whether it was on the way forward, where ReLU has seen the sign of the output
};

// Whether float32 does not hold a factor, or not its products.
DEVICE bool extreme(double factor) {
    const double size = fabs(factor);
    return size > 1e30 || (size < 1e-30 && size > 0);
}

// Weight and bias of one channel; kernels read them early, as memory takes its time.
struct ChannelAffine {
    double weight, bias;
};
DEVICE ChannelAffine read_affine(const Affine& affine, long long c) {
    return {affine.weight ? affine.weight.get(c) : 1, affine.bias ? affine.bias.get(c) : 0};
}

// The channel of this mean and variance; `given` is what read_affine has read for it.
DEVICE Channel make_channel(double mean, double var, const Affine& affine, const ChannelAffine& given) {
    Channel channel;
    channel.rstd = 1 / sqrt(var + affine.eps);
    channel.scale = channel.rstd * given.weight;
    channel.wide = channel.rstd < 1e-15 || channel.rstd > 1e15 || extreme(channel.scale) || fabs(mean) > 1e30;
    channel.center = channel.wide ? mean : (double)(acc_t)mean;
    const bool finite = channel.center - channel.center == 0;
    channel.rest = finite ? mean - channel.center : 0;  // inf - inf is NaN
    channel.shift = channel.rest == 0 ? 0 : __dmul_rn(-channel.rest, channel.scale);  // 0 * inf is NaN
    if (affine.bias) {
        channel.shift += given.bias;
        channel.wide = channel.wide || fabs(channel.shift) > 1e30;
    }
    channel.gate_wide = channel.wide;
    channel.slope = channel.offset = 0;
    return channel;
}

// Channel c on the way back, whose statistics are known.
DEVICE Channel channel_of(const Statistics& statistics, const Affine& affine, long long c) {
    const double* pair = statistics.pairs + 2 * c;
    return make_channel(pair[0], pair[1], affine, read_affine(affine, c));
}

// Sets slope and offset from sums = {sum(dy), sum(dy * xhat)} over the whole batch:
//     dx = (dy - (x - center) * slope - offset) * scale.
DEVICE void set_gradient(Channel& channel, const double (&sums)[2], double inv_count) {
    channel.slope = sums[1] * channel.rstd * inv_count;
    channel.offset = __dmul_rn(sums[0], inv_count) - __dmul_rn(channel.slope, channel.rest);
    channel.wide = channel.wide || extreme(channel.slope) || extreme(channel.offset);
}

// Sets slope and offset from the means of scale * dy and of scale * dy * xhat over a row, whose channels have scales of
// their own and one mean and variance:
//     dx = dy * scale - ((x - center) * slope + offset).
DEVICE void set_row_gradient(Channel& channel, const double (&means)[2]) {
    channel.slope = means[1] * channel.rstd;
    channel.offset = means[0] - __dmul_rn(channel.slope, channel.rest);
    channel.wide = channel.wide || extreme(channel.slope) || extreme(channel.offset);
}

// Writes sums to their place in those of all parts and channels.
DEVICE void set_sums(const Sums& sums, long long at, const double (&own)[2]) {
    sums.dy[at] = own[0];
    sums.dy_xhat[at] = own[1];
}

// Writes the gradients of weight and bias of channel c, which are these sums, to vectors that may be null.
DEVICE void set_vectors(const Vector& dweight, const Vector& dbias, const double (&sums)[2], long long c) {
    if (dbias) dbias.set(c, sums[0]);
    if (dweight) dweight.set(c, sums[1]);
}
