// bn_backward: all gradients, dx = (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where
// activation passed dy; dresidual = dy there; dweight = sum(dy * xhat), dbias = sum(dy)
//
// dy and x are read once. A block takes a tile of columns of both, which fit into its shared memory; each thread keeps
// some of the packs of one column there. Where ReLU stopped dy it becomes 0 on chip, on the way to the sums.
// Mirror: numpy_ops.bn_backward
#include "gradient_sums.cuh"

extern "C" __global__ void REGISTERS(128) bn_backward(
    const data_t* dy,                        // [M, C]
    const data_t* x,                         // [M, C]
    Statistics statistics,
    Affine affine,
    Epilogue epilogue,                       // what ReLU passed is read
    double inv_count,                        // 1 / count in training; 0: the statistics are constants
    // outputs
    Gradients gradients,
    // sizes
    ChannelsLast sizes) {
    const Tile own(sizes);
    const long long c = own.channel();
    const Packs packs(own);
    const Left left(epilogue.mask, own);
    raw_t *const at_dy = staging() + threadIdx.x, *const at_x = at_dy + sizes.tile * sizes.M;
    const int group = stage<ROWS>({at_dy, at_x}, {dy, x}, packs);
    const OnChip kept_dy = {at_dy, group}, kept_x = {at_x, group};
    __shared__ Lanes lanes;
    if (own.looks_after()) lanes.set(threadIdx.x, channel_of(statistics, affine, c));
    double sums[2];
    {
        const OwnChannels before(own, lanes);
        ColumnSums of_thread;
        sum_all(kept_dy, kept_x, packs, left, epilogue, before, of_thread);
        sum_tile(own, of_thread, sums);
    }
    if (own.looks_after()) {
        Channel channel = lanes.channels[threadIdx.x];
        finish_sums(sums, channel);
        set_gradient(channel, sums, inv_count);
        lanes.set(threadIdx.x, channel);
    }
    const OwnChannels after(own, lanes);

    input_gradients_all(kept_dy, kept_x, packs, left, Epilogue(), inv_count == 0, after, gradients);
    if (own.looks_after()) set_vectors(gradients.dweight, gradients.dbias, sums, c);
}
