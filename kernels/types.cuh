// The dtypes by NumPy's names, conversions between them, and vectors of one value per channel.
//
// No CUDA header is needed: inline PTX stands behind small functions, each with a plain C++ body for other compilers.
// The host sets these macros: DATA_T (float16, bfloat16, float32, float64), WIDTH, the elements of a pack, INDEX_BITS
// (32, 64) and THREADS, the threads of every block; for some kernels also TEAM (team.cuh) and CLUSTER_BLOCKS
// (cluster.cuh).
#pragma once

#define DEVICE __device__ __forceinline__

typedef float float32;
typedef double float64;
struct float16 {
    unsigned short bits;
};
struct bfloat16 {
    unsigned short bits;
};

// The dtype of the arithmetic: float32, or float64 for float64 data.
template <class T>
struct Accumulation {
    typedef float type;
};
template <>
struct Accumulation<double> {
    typedef double type;
};

// The architecture that is compiled for, such as 900 for sm_90; 0 for other compilers than NVIDIA's.
#ifdef __CUDA_ARCH__
constexpr int ARCHITECTURE = __CUDA_ARCH__;
#else
constexpr int ARCHITECTURE = 0;
#endif

// Blocks that are on a multiprocessor (SM) at a time if each thread has so many registers: a multiprocessor has 65536
// of them, and places for 16 blocks at least.
constexpr int blocks_with(int registers) {
    return 65536 / registers / THREADS < 16 ? 65536 / registers / THREADS : 16;
}
// Limits the registers of a thread to about `most`, so that so many blocks find room.
#define REGISTERS(most) __launch_bounds__(THREADS, blocks_with(most))

typedef DATA_T data_t;                        // an element of the arrays
typedef Accumulation<data_t>::type acc_t;     // a number in the dtype of the arithmetic
template <class T>
constexpr bool is_float16() { return false; }
template <>
constexpr bool is_float16<float16>() { return true; }
constexpr bool IS_FLOAT16 = is_float16<data_t>();
#if INDEX_BITS == 64
typedef long long index_t;                    // the number of an element in its array
#else
typedef int index_t;
#endif

constexpr unsigned ALL_LANES = 0xffffffffu;   // all threads of a warp, for shuffles

// A value that the compiler knows, though it is given as an argument.
template <class T, T VALUE>
struct Known {
    static constexpr T value = VALUE;
    DEVICE constexpr operator T() const { return VALUE; }
};
typedef Known<bool, true> Yes;
typedef Known<bool, false> No;

// Calls body with a flag that the compiler knows: so choices are made once, outside loops.
template <class Body>
DEVICE void with_flag(bool flag, Body body) {
    if (flag)
        body(Yes());
    else
        body(No());
}

// ---------------------------------------------------------------------------------------------------------------------
// Conversions to the dtype of the arithmetic, which are exact

DEVICE float widen(float x) { return x; }
DEVICE double widen(double x) { return x; }
DEVICE float widen(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
DEVICE float widen(float16 x) {
#ifdef __CUDA_ARCH__
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
    return result;
#else
    const unsigned sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    if (magnitude < 0x0400u)  // subnormal: the magnitude counts steps of 2^-24
        return __uint_as_float(__float_as_uint(magnitude * 0x1p-24f) | sign);
    const unsigned exponent = magnitude < 0x7c00u ? 112u << 23 : 224u << 23;  // inf and NaN keep the largest one
    return __uint_as_float(((magnitude << 13) + exponent) | sign);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Conversions from the dtype of the arithmetic: to the nearest, ties to even

DEVICE void narrow(float x, float& result) { result = x; }
DEVICE void narrow(double x, double& result) { result = x; }
DEVICE void narrow(double x, float& result) { result = (float)x; }
DEVICE void narrow(float x, bfloat16& result) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#else
    const unsigned bits = __float_as_uint(x);
    const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    result.bits = (unsigned short)(x == x ? rounded : 0x7fc0u | (bits >> 16));
#endif
}
DEVICE void narrow(float x, float16& result) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#else
    const unsigned bits = __float_as_uint(x), sign = (bits >> 16) & 0x8000u;
    unsigned magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        magnitude = 0x7fffu;  // NaN
    else if (magnitude >= 0x477ff000u)
        magnitude = 0x7c00u;  // beyond the largest one: inf
    else if (magnitude < 0x38800000u)  // subnormal: next to 0.5 a float32 has the same steps
        magnitude = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    else
        magnitude = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    result.bits = (unsigned short)(sign | magnitude);
#endif
}
DEVICE void narrow(double x, bfloat16& result) { narrow((float)x, result); }
DEVICE void narrow(double x, float16& result) {
    // The way is through a float32 that is odd where it is not exact: then rounding twice is like rounding once.
    const float cut = __double2float_rz(x);
    narrow(cut == x ? cut : __uint_as_float(__float_as_uint(cut) | 1u), result);
}

// A word of two numbers, each narrowed, the first one in its low half. From float32 it takes one instruction from sm_80
// on.
template <class T, class A>
DEVICE unsigned narrow_pair(A low, A high) {
    T a, b;
    narrow(low, a);
    narrow(high, b);
    return (unsigned)a.bits | (unsigned)b.bits << 16;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
DEVICE unsigned narrow_pair<float16, float>(float low, float high) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
template <>
DEVICE unsigned narrow_pair<bfloat16, float>(float low, float high) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Vectors

// The dtypes by their numbers, those of dtypes.FLOATS.
enum { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 };

// One value for each channel, in any of the dtypes and at any stride.
struct Vector {
    char* data;          // null if there is no vector
    long long stride;    // bytes from a value to the next one
    long long dtype;     // number of the dtype in the enum above

    DEVICE explicit operator bool() const { return data != nullptr; }

    DEVICE double get(long long i) const {
        const char* at = data + i * stride;
        switch (dtype) {
            case FLOAT16: return widen(*(const float16*)at);
            case BFLOAT16: return widen(*(const bfloat16*)at);
            case FLOAT32: return *(const float*)at;
            default: return *(const double*)at;
        }
    }

    // Whether a value is finite in the dtype of the vector.
    DEVICE bool holds(double value) const {
        double rounded = value;
        if (dtype == FLOAT16) {
            float16 half;
            narrow(value, half);
            rounded = widen(half);
        } else if (dtype == BFLOAT16) {
            bfloat16 half;
            narrow(value, half);
            rounded = widen(half);
        } else if (dtype == FLOAT32) {
            rounded = (float)value;
        }
        return rounded - rounded == 0;
    }

    DEVICE void set(long long i, double value) const {
        char* at = data + i * stride;
        switch (dtype) {
            case FLOAT16: narrow(value, *(float16*)at); break;
            case BFLOAT16: narrow(value, *(bfloat16*)at); break;
            case FLOAT32: narrow(value, *(float*)at); break;
            default: *(double*)at = value;
        }
    }
};
