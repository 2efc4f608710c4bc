// CUDA's names for g++: this file is included in front of the very text of a kernel that NVRTC compiles.
//
// Memory is not wrapped: the compiler's own instrumentation (-fsanitize=thread, alignment, bounds, ...) calls the
// runtime for every access that a kernel makes; see runtime.cpp.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

using std::fabs;
using std::fma;
using std::isfinite;
using std::isinf;
using std::isnan;
using std::sqrt;

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static const
// Shared memory is static, since blocks run one after the other. The attribute keeps the compiler from making a
// constant of memory that is never written. extern __shared__ arrives here as extern __dynamic_shared__.
#define __shared__ static __attribute__((used))
#define __dynamic_shared__
// A mark where zeroed statics begin: assembler comes before all that the compiler puts there.
asm(".pushsection .bss\n.balign 32\n.globl emulated_shared_begin\n.hidden emulated_shared_begin\n"
    "emulated_shared_begin:\n.popsection");
#define EMULATED_UNCHECKED __attribute__((no_sanitize("thread"), no_sanitize("undefined")))
#define EMULATED_EXPORTED EMULATED_UNCHECKED __attribute__((visibility("default")))

// ---------------------------------------------------------------------------------------------------------------------
// Vector types

#define EMULATED_VECTORS(T, name, a1, a2, a4)                                            \
    struct alignas(a2) name##2 { T x, y; };                                             \
    struct name##3 { T x, y, z; };                                                      \
    struct alignas(a4) name##4 { T x, y, z, w; };                                       \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                          \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                  \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTORS(signed char, char, 1, 2, 4)
EMULATED_VECTORS(unsigned char, uchar, 1, 2, 4)
EMULATED_VECTORS(short, short, 2, 4, 8)
EMULATED_VECTORS(unsigned short, ushort, 2, 4, 8)
EMULATED_VECTORS(int, int, 4, 8, 16)
EMULATED_VECTORS(unsigned, uint, 4, 8, 16)
EMULATED_VECTORS(float, float, 4, 8, 16)
EMULATED_VECTORS(long long, longlong, 8, 16, 16)
EMULATED_VECTORS(unsigned long long, ulonglong, 8, 16, 16)
EMULATED_VECTORS(double, double, 8, 16, 16)
#undef EMULATED_VECTORS

struct dim3 {
    unsigned x, y, z;
};

// ---------------------------------------------------------------------------------------------------------------------
// The runtime

extern "C" {
uint3 emulated_thread_idx();
uint3 emulated_block_idx();
uint3 emulated_block_dim();
uint3 emulated_grid_dim();
// Waits for the block. The result is decided by vote: 0 for nothing, 1 for how many predicates hold, 2 all, 3 any.
int emulated_block_barrier(const char* what, int predicate, int vote, const char* file, int line);
// Hands in a value, waits for the lanes of mask, and gets the value of lane source (none if source < 0).
void emulated_exchange(const char* what, unsigned mask, const void* value, void* result, unsigned size, int source,
                       const char* file, int line);
// Returns a bit for each lane of the mask, set if its predicate is not 0.
unsigned emulated_ballot(const char* what, unsigned mask, int predicate, const char* file, int line);
unsigned emulated_lane();
void emulated_access(const void* p, size_t size, size_t alignment, bool write, const void* pc);
void emulated_atomic(const void* p, size_t size, const void* pc);
void emulated_cluster_arrive(const char* what, bool releases, const char* file, int line);
void emulated_cluster_wait(const char* file, int line);
unsigned emulated_cluster_rank(const char* file, int line);
unsigned emulated_cluster_size(const char* file, int line);
void* emulated_map_shared(const void* p, unsigned rank, const char* file, int line);
void emulated_copy(void* to, const void* from, size_t size, size_t zeros, const void* pc);
void emulated_commit_copies();
void emulated_wait_for_copies(unsigned latest);
}

#define threadIdx (emulated_thread_idx())
#define blockIdx (emulated_block_idx())
#define blockDim (emulated_block_dim())
#define gridDim (emulated_grid_dim())
constexpr int warpSize = 32;

#define EMULATED_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATED_HERE) { emulated_block_barrier("__syncthreads", 0, 0, file, line); }
inline int __syncthreads_count(int p, EMULATED_HERE) {
    return emulated_block_barrier("__syncthreads_count", p, 1, file, line);
}
inline int __syncthreads_and(int p, EMULATED_HERE) {
    return emulated_block_barrier("__syncthreads_and", p, 2, file, line);
}
inline int __syncthreads_or(int p, EMULATED_HERE) {
    return emulated_block_barrier("__syncthreads_or", p, 3, file, line);
}
inline void __syncwarp(unsigned mask = ~0u, EMULATED_HERE) {
    emulated_exchange("__syncwarp", mask, nullptr, nullptr, 0, -1, file, line);
}
inline void __cluster_barrier_arrive(EMULATED_HERE) {
    emulated_cluster_arrive("__cluster_barrier_arrive", true, file, line);
}
inline void __cluster_barrier_arrive_relaxed(EMULATED_HERE) {
    emulated_cluster_arrive("__cluster_barrier_arrive_relaxed", false, file, line);
}
inline void __cluster_barrier_wait(EMULATED_HERE) { emulated_cluster_wait(file, line); }
inline unsigned __clusterRelativeBlockRank(EMULATED_HERE) { return emulated_cluster_rank(file, line); }
inline unsigned __clusterSizeInBlocks(EMULATED_HERE) { return emulated_cluster_size(file, line); }
inline void* __cluster_map_shared_rank(const void* p, unsigned rank, EMULATED_HERE) {
    return emulated_map_shared(p, rank, file, line);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

template <class T>
EMULATED_UNCHECKED T emulated_shuffle(const char* what, unsigned mask, T value, int source, const char* file, int line) {
    T result;
    emulated_exchange(what, mask, &value, &result, sizeof(T), source, file, line);
    return result;
}
// Shuffles within groups of `width` lanes; a lane whose source is outside its group gets its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATED_HERE) {
    const int lane = emulated_lane(), group = lane & ~(width - 1);
    return emulated_shuffle("__shfl_sync", mask, value, group | (source & (width - 1)), file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, EMULATED_HERE) {
    const int lane = emulated_lane(), source = lane ^ distance;
    const bool inside = source / width <= lane / width;
    return emulated_shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, EMULATED_HERE) {
    const int lane = emulated_lane(), source = lane + (int)distance;
    return emulated_shuffle("__shfl_down_sync", mask, value, source / width == lane / width ? source : lane, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, EMULATED_HERE) {
    const int lane = emulated_lane(), source = lane - (int)distance;
    const bool inside = source >= (lane & ~(width - 1));
    return emulated_shuffle("__shfl_up_sync", mask, value, inside ? source : lane, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMULATED_HERE) {
    return emulated_ballot("__ballot_sync", mask, p, file, line);
}
inline int __any_sync(unsigned mask, int p, EMULATED_HERE) {
    return emulated_ballot("__any_sync", mask, p, file, line) != 0;
}
inline int __all_sync(unsigned mask, int p, EMULATED_HERE) {
    return emulated_ballot("__all_sync", mask, !p, file, line) == 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Intrinsics

// Accesses of whole vectors: the compiler would split a plain one, and drop the parts that are not used.
#define EMULATED_LOAD(name)                                                                             \
    template <class T>                                                                                  \
    EMULATED_UNCHECKED __noinline__ T name(const T* p) {                                                \
        emulated_access(p, sizeof(T), alignof(T), false, __builtin_return_address(0));                  \
        return *p;                                                                                      \
    }
template <class T>
EMULATED_UNCHECKED __noinline__ void emulated_store(T* p, const T* value) {
    emulated_access(p, sizeof(T), alignof(T), true, __builtin_return_address(0));
    *p = *value;
}
#define EMULATED_STORE(name)                                                                            \
    template <class T>                                                                                  \
    inline __attribute__((always_inline)) void name(T* p, const T& value) {                             \
        const T copy = value;                                                                           \
        emulated_store(p, &copy);                                                                       \
    }
EMULATED_LOAD(__ldg)
EMULATED_LOAD(__ldca)
EMULATED_LOAD(__ldcg)
EMULATED_LOAD(__ldcs)
EMULATED_LOAD(__ldcv)
EMULATED_LOAD(__ldlu)
EMULATED_STORE(__stcg)
EMULATED_STORE(__stcs)
EMULATED_STORE(__stwb)
EMULATED_STORE(__stwt)
#undef EMULATED_LOAD
#undef EMULATED_STORE

template <class To, class From>
inline To emulated_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulated_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }
inline int __double2loint(double x) { return (int)(unsigned)emulated_bits<unsigned long long>(x); }
inline int __double2hiint(double x) { return (int)(emulated_bits<unsigned long long>(x) >> 32); }
inline double __hiloint2double(int hi, int lo) {
    return emulated_bits<double>((unsigned long long)(unsigned)hi << 32 | (unsigned)lo);
}
inline float __double2float_rz(double x) {
    const float nearest = (float)x;
    return std::fabs((double)nearest) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled without contraction
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }

template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
    return b < a ? (std::common_type_t<A, B>)b : (std::common_type_t<A, B>)a;
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
    return a < b ? (std::common_type_t<A, B>)b : (std::common_type_t<A, B>)a;
}

// Defined for integers alone, since sums of floats depend on an order that cannot be repeated.
template <class T>
EMULATED_UNCHECKED __noinline__ T atomicAdd(T* p, std::enable_if_t<std::is_integral<T>::value, T> value) {
    emulated_atomic(p, sizeof(T), __builtin_return_address(0));
    // No lock is needed, because threads are switched at barriers only.
    const T old = *p;
    *p = old + value;
    return old;
}

// Copies from global to shared memory, as in cuda_pipeline_primitives.h; they take place when the thread waits for
// them.
EMULATED_UNCHECKED __noinline__ inline void __pipeline_memcpy_async(void* to, const void* from, size_t size,
                                                                    size_t zeros = 0) {
    emulated_copy(to, from, size, zeros, __builtin_return_address(0));
}
inline void __pipeline_commit() { emulated_commit_copies(); }
inline void __pipeline_wait_prior(unsigned latest) { emulated_wait_for_copies(latest); }

// ---------------------------------------------------------------------------------------------------------------------
// Entries of a module: functions that call a kernel with an array of addresses of its arguments, as cuLaunchKernel
// does, and that describe its parameters

struct EmulatedParameter {
    int size;
    char kind;     // 'p' for a pointer, 'f' a float, 'i' an integer, 's' a struct
    char pointee;  // kind of what a pointer points to, also 'v' for void
    int pointee_size;
};

template <class T>
constexpr char emulated_kind() {
    if (std::is_pointer<T>::value) return 'p';
    if (std::is_floating_point<T>::value) return 'f';
    if (std::is_integral<T>::value || std::is_enum<T>::value) return 'i';
    return std::is_void<T>::value ? 'v' : 's';
}
template <class T>
struct EmulatedSize {
    static constexpr int value = sizeof(T);
};
template <>
struct EmulatedSize<void> {
    static constexpr int value = 0;
};
template <class T>
constexpr EmulatedParameter emulated_parameter() {
    using Pointee = std::remove_cv_t<std::remove_pointer_t<T>>;
    return {(int)sizeof(T), emulated_kind<T>(), emulated_kind<Pointee>(), EmulatedSize<Pointee>::value};
}
template <class... A, size_t... I>
EMULATED_UNCHECKED void emulated_apply(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}
template <class... A>
EMULATED_UNCHECKED void emulated_call(void (*kernel)(A...), void** arguments) {
    emulated_apply(kernel, arguments, std::index_sequence_for<A...>());
}
template <class... A>
EMULATED_UNCHECKED const EmulatedParameter* emulated_parameters(void (*)(A...), int* count) {
    static const EmulatedParameter parameters[] = {emulated_parameter<A>()..., {}};
    *count = sizeof...(A);
    return parameters;
}

#define EMULATED_ENTRY(name)                                                                            \
    extern "C" EMULATED_EXPORTED void emulated_entry_##name(void** arguments) {                        \
        emulated_call(name, arguments);                                                                \
    }                                                                                                  \
    extern "C" EMULATED_EXPORTED const void* emulated_parameters_##name(int* count) {                  \
        return emulated_parameters(name, count);                                                       \
    }
// The blocks of a cluster by the kernel's __cluster_dims__, or zeros if it has none. EMULATED_CLUSTER gets the
// attributes of the kernel's declaration, of which all other macros are empty.
struct EmulatedCluster {
    int x = 0, y = 1, z = 1;
};
#define EMULATED_CLUSTER_DIMS(...) , EmulatedCluster { __VA_ARGS__ }
#define EMULATED_CLUSTER(name, ...)                                                                     \
    extern "C" EMULATED_EXPORTED void emulated_cluster_##name(int* dims) {                             \
        constexpr EmulatedCluster cluster = (EmulatedCluster{0, 0, 0} __VA_ARGS__);                     \
        dims[0] = cluster.x, dims[1] = cluster.y, dims[2] = cluster.z;                                  \
    }
// The function that tells where shared memory lies: it is all of the module's zeroed statics.
#define EMULATED_MODULE                                                                                 \
    extern "C" char emulated_shared_begin[] __attribute__((visibility("hidden")));                      \
    extern "C" char _end[] __attribute__((visibility("hidden")));                                       \
    extern "C" EMULATED_EXPORTED void emulated_shared(char** begin, char** end) {                      \
        *begin = emulated_shared_begin;                                                                 \
        *end = _end;                                                                                    \
    }
