// bn_backward: all gradients, dx = (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where
// activation passed dy; dresidual = dy there; dweight = sum(dy * xhat), dbias = sum(dy)
//
// dy and x are read once. A team, or all blocks of a cluster, take a channel of both, which fit into their shared
// memory; each thread keeps some of the packs there. Where ReLU stopped dy it becomes 0 on chip, on the way to the
// sums.
// Mirror: numpy_ops.bn_backward
#include "gradient_sums.cuh"

extern "C" __global__ void CLUSTER REGISTERS(96) bn_backward(
    const data_t* dy,                        // [N, C, L]
    const data_t* x,                         // [N, C, L]
    Statistics statistics,
    Affine affine,
    Epilogue epilogue,                       // what ReLU passed is read
    double inv_count,                        // 1 / count in training; 0: the statistics are constants
    // outputs
    Gradients gradients,
    // sizes
    ChannelsFirst sizes) {
    cluster_start();
    const Place place(sizes);
    const long long c = place.c;
    const Packs packs(place, sizes);
    const Left left(epilogue.mask, place);
    raw_t *const at_dy = kept(sizes, 0), *const at_x = kept(sizes, 1);
    const int group = stage<SUMMED>({at_dy, at_x}, {dy, x}, packs);
    const OnChip kept_dy = {at_dy, group}, kept_x = {at_x, group};
    Channel& channel = channel_of_team();
    if (member() == 0) channel = channel_of(statistics, affine, c);
    __syncthreads();

    double sums[2];
    sum_all(kept_dy, kept_x, packs, left, epilogue, OneChannel(channel), sums);
    cluster_wait();  // all blocks have started
    team_sum(sums);
    cluster_sum(sums);
    if (member() == 0) {
        finish_sums(sums, channel);
        set_gradient(channel, sums, inv_count);
    }
    __syncthreads();

    input_gradients_all(kept_dy, kept_x, packs, left, Epilogue(), inv_count == 0, OneChannel(channel), gradients);
    if (place.owns()) set_vectors(gradients.dweight, gradients.dbias, sums, c);
}
