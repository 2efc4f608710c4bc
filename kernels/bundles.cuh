// Bundles: arguments of the steps that always travel together, as one thing with one name.
//
// Each is a NamedTuple of the same name and fields in cupybn/_steps/bundles.py; the launcher reads the fields from
// here. Kernels take bundles by value: their fields lie in constant memory, where single parameters would lie as well.
// None is a null pointer. Shapes are those of channels first; channels last, [N, C, L] is [M, C].
#pragma once
#include "pack.cuh"

// The activations, in the order of bundles.ACTIVATIONS.
enum Activation : long long { NONE, RELU };

// Weight, bias and eps, by which x becomes weight * (x - mean) / sqrt(var + eps) + bias.
struct Affine {
    Vector weight;               // [C] or null, which stands for 1
    Vector bias;                 // [C] or null, which stands for 0
    double eps;
};

// The running statistics: read in eval mode, moved in training. Without arrays in training that moves none.
struct Running {
    Vector mean;                 // [C] or null
    Vector var;                  // [C] or null
    double momentum;             // weight of the new batch, or null, which is NaN and stands for 1 / (batches + 1)
    long long* batches;          // [] or null; num_batches_tracked
    long long skip_nonfinite;    // whether a batch leaves them alone that is not finite, rounded to their dtypes
};

// Last part of the output: a value becomes activation(value + residual), and 0 where a mask leaves it out.
struct Epilogue {
    const data_t* residual;      // [N, C, L] or null; added in the way forward
    Activation activation;
    passed_t* passed;            // [N, C, L / WIDTH] or null; gets where ReLU passes, for the way back
    const bool* mask;            // [N, L] or null; what it leaves out is in no sum, and gradients are 0 there
};

// Count, mean and sum of squared deviations of each channel, in P parts that are still to be merged.
struct Moments {
    double* count;               // [P]
    double* mean;                // [P, C]
    double* m2;                  // [P, C]; sum((x - mean)^2)
    long long* batches;          // [] or null; copy of num_batches_tracked before this batch, if there is no momentum
};

// Mean and biased variance of each channel: copies, so that what used them stays right.
struct Statistics {
    double* pairs;               // [C, 2]; mean and variance of a channel side by side
    double* count_left;          // [1] or null; values of each channel that a mask has left
};

// Sums over the whole batch for the gradients, in P parts that are still to be added.
struct Sums {
    double* dy;                  // [P, C]; sum(dy), the gradient of bias
    double* dy_xhat;             // [P, C]; sum(dy * xhat), the gradient of weight
};

// Arrays that a step writes gradients to.
struct Gradients {
    data_t* dx;                  // [N, C, L]
    data_t* dresidual;           // [N, C, L] or null
    Vector dweight;              // [C] or null
    Vector dbias;                // [C] or null
};

// What the way back of second order begins with: the gradient of the output, and a cotangent of each gradient, which is
// the gradient of a loss with respect to it. Null stands for zeros.
struct Incoming {
    const data_t* dy;            // [N, C, L]
    const data_t* cdx;           // [N, C, L] or null; cotangent of dx
    const data_t* cdresidual;    // [N, C, L] or null; cotangent of dresidual
    Vector cdweight;             // [C] or null; cotangent of dweight
    Vector cdbias;               // [C] or null; cotangent of dbias
};

// Sums over the whole batch for the gradients of second order, in P parts that are still to be added.
struct SecondSums {
    double* dy;                  // [P, C]; sum(dy)
    double* dy_xhat;             // [P, C]; sum(dy * xhat)
    double* cdx;                 // [P, C]; sum(cdx)
    double* cdx_xhat;            // [P, C]; sum(cdx * xhat)
    double* cdx_dy;              // [P, C]; sum(cdx * dy)
};

// Arrays that a step of second order writes gradients to: those of the way back's own arguments.
struct SecondGradients {
    data_t* ddy;                 // [N, C, L]; gradient of dy
    data_t* dx;                  // [N, C, L]
    Vector dweight;              // [C] or null
};

// What a call of dropout has drawn: an element is dropped where its word is below the threshold, or else scaled.
struct Drops {
    const unsigned long long* drawn;  // [2]; seed and number of the call
    long long threshold;         // p * 2^32, rounded to an integer; may be 2^32 itself, which no word reaches
    double scale;                // one over 1 - p; kernels round it to the dtype of the arithmetic
};
