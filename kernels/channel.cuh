// Batch norm of one channel: what depends on the channel alone.
//
// The mean is never rounded to one float32: with center the mean so rounded and rest = mean - center,
//     (x - mean) * scale + bias  =  (x - center) * scale + (bias - rest * scale).
// Mirror: numpy_ops._affine
#pragma once
#include "types.cuh"

struct Channel {
    double center, rest, rstd, scale, shift;
    double slope, offset;  // of the input's gradient
    bool wide;             // float32 does not reach: values near its limits
};

// float32 does not hold a factor, or not its products.
DEVICE bool extreme(double factor) {
    const double size = fabs(factor);
    return size > 1e30 || (size < 1e-30 && size > 0);
}

// Weight and bias of a channel: read early, as memory takes its time.
struct Affine {
    double weight, bias;
    bool has_bias;
};
DEVICE Affine read_affine(const Vector& weight, const Vector& bias, long long c) {
    return {weight ? weight.get(c) : 1, bias ? bias.get(c) : 0, (bool)bias};
}

DEVICE Channel make_channel(double mean, double var, double eps, const Affine& given) {
    Channel channel;
    channel.rstd = 1 / sqrt(var + eps);
    channel.scale = channel.rstd * given.weight;
    channel.wide = channel.rstd < 1e-15 || channel.rstd > 1e15 || extreme(channel.scale) || fabs(mean) > 1e30;
    channel.center = channel.wide ? mean : (double)(acc_t)mean;
    const bool finite = channel.center - channel.center == 0;
    channel.rest = finite ? mean - channel.center : 0;
    channel.shift = channel.rest == 0 ? 0 : __dmul_rn(-channel.rest, channel.scale);
    if (given.has_bias) {
        channel.shift += given.bias;
        channel.wide = channel.wide || fabs(channel.shift) > 1e30;
    }
    channel.slope = channel.offset = 0;
    return channel;
}

// dx = (dy - (x - center) * slope - offset) * scale, from the sums over the whole batch.
DEVICE void set_gradient(Channel& channel, double sum_dy, double sum_dy_xhat, double inv_count) {
    channel.slope = sum_dy_xhat * channel.rstd * inv_count;
    channel.offset = __dmul_rn(sum_dy, inv_count) - __dmul_rn(channel.slope, channel.rest);
    channel.wide = channel.wide || extreme(channel.slope) || extreme(channel.offset);
}
