// bn_update_running: running = (1 - momentum) * running + momentum * batch, with the unbiased variance of the batch
//
// One block, whose threads take a channel each and go on in strides: all have read the counter when one moves it. A batch
// of less than two values for each channel changes nothing.
// Mirror: numpy_ops.bn_update_running
#include "running.cuh"

extern "C" __global__ void REGISTERS(80) bn_update_running(
    const double* moments_count,             // [1]
    const double* moments_mean,              // [1, C]
    const double* moments_m2,                // [1, C]
    const long long* moments_batches,        // [] or null: momentum is 1 / (batches + 1); may be the counter itself
    Vector running_mean,                     // [C]
    Vector running_var,                      // [C]
    double momentum,
    long long* num_batches_tracked,          // [] or null
    // sizes
    long long C) {
    const double count = *moments_count;
    const bool defined = count > 1;
    for (long long c = threadIdx.x; defined && c < C; c += THREADS)
        update_running({count, moments_mean[c], moments_m2[c]}, read_running(running_mean, running_var, c), running_mean,
                       running_var, momentum, moments_batches, c);
    __syncthreads();
    if (threadIdx.x == 0 && defined && num_batches_tracked) *num_batches_tracked += 1;
}
