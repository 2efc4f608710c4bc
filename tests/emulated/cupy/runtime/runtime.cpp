// Runs kernels: the blocks of a grid one after the other (those of a cluster by turns), every thread as a fibre. It
// checks every access to memory.
//
// Kernels are compiled with -fsanitize=thread and parts of -fsanitize=undefined. The compiler then calls __tsan_read4
// and its like before each access, and __ubsan_handle_... where an access is misaligned, an index beyond an array and
// so on. Nothing of the sanitizers' own libraries is linked: these functions are defined here.
//
// An error ends the launch: the message is kept, and all fibres are abandoned. That jumps over frames of fibres, so
// what runs in a fibre owns nothing: no std::string, no std::vector.
//
// launch.h has the state of a launch, access.h the checks of an access, schedule.h the order of threads, flush.h the
// treatment of subnormal numbers.
#include <dlfcn.h>

#include "flush.h"
#include "schedule.h"

extern "C" {

// Launches a kernel; the message of the result is empty if all went well. The blocks of a cluster, at most 8, are
// neighbours in x; cluster is 0 on a device without clusters, where each block is alone. If chosen is null the whole
// grid is run, which must have fewer than 2^30 threads; else only the clusters whose first blocks are named,
// of a grid with fewer than 2^32.
void emulated_launch(void (*entry)(void**), void** arguments, const unsigned* grid, const unsigned* block_dim,
                     unsigned cluster, char* shared_begin, char* shared_end, char* dynamic_begin, size_t dynamic_size,
                     size_t dynamic_limit, const Argument* ranges, int range_count, const uint32_t* chosen,
                     int chosen_count, uint64_t seed, Result* result) {
    memset(result, 0, sizeof *result);
    launch.entry = entry;
    launch.arguments = arguments;
    launch.grid = {grid[0], grid[1], grid[2]};
    launch.block = {block_dim[0], block_dim[1], block_dim[2]};
    launch.threads = block_dim[0] * block_dim[1] * block_dim[2];
    launch.ranges.clear();
    for (int i = 0; i < range_count; i++) launch.ranges.emplace_back(ranges[i]);
    launch.last_range = 0;
    launch.shared_begin = (uintptr_t)shared_begin;
    launch.shared_end = (uintptr_t)shared_end;
    launch.dynamic_begin = (uintptr_t)dynamic_begin;
    launch.dynamic_end = launch.dynamic_begin + dynamic_size;
    launch.dynamic_limit = launch.dynamic_begin + dynamic_limit;
    launch.result = result;
    launch.random = seed;
    launch.has_clusters = cluster > 0;
    const unsigned blocks_of_cluster = std::max(1u, cluster);
    launch.cluster_threads = blocks_of_cluster * launch.threads;
    while (pool.size() < launch.cluster_threads) {
        pool.emplace_back(new Thread());
        pool.back()->stack = new_stack();
    }
    launch.blocks = std::vector<Block>(blocks_of_cluster);
    for (unsigned rank = 0; rank < blocks_of_cluster; rank++) {
        launch.blocks[rank].threads = &pool[rank * launch.threads];
        launch.blocks[rank].shared = Shadow(launch.shared_begin, launch.shared_end);
    }
    block = &launch.blocks[0];
    std::vector<uint32_t> firsts;  // number of the first block of each cluster
    if (chosen)
        firsts.assign(chosen, chosen + chosen_count);
    else
        for (uint32_t b = 0; b < grid[0] * grid[1] * grid[2]; b += blocks_of_cluster) firsts.push_back(b);
    shuffle(firsts);
    {
        const Flush flush;
        for (uint32_t first : firsts) {
            run_cluster(first);
            if (failed()) {
                for (auto& thread : pool) thread->started = false;  // their fibres are abandoned
                break;
            }
        }
    }
    launch.ranges.clear();
    launch.blocks.clear();
}

// The distance of a code address from the beginning of its module.
uint64_t emulated_offset(const void* pc) {
    Dl_info info;
    return dladdr(pc, &info) ? (uintptr_t)pc - (uintptr_t)info.dli_fbase : 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// The functions that device.h declares

Index emulated_thread_idx() { return current->index; }
Index emulated_block_idx() { return block->index; }
Index emulated_block_dim() { return launch.block; }
Index emulated_grid_dim() { return launch.grid; }
unsigned emulated_lane() { return current->number % 32; }

int emulated_block_barrier(const char* what, int predicate, int vote, const char* file, int line) {
    current->predicate = predicate;
    wait(AT_BLOCK_BARRIER, what, file, line);
    if (vote == 1) return block->votes;
    return vote == 2 ? block->votes == (int)launch.threads : block->votes > 0;
}

void emulated_exchange(const char* what, unsigned mask, const void* value, void* result, unsigned size, int source,
                       const char* file, int line) {
    if (size > sizeof current->given) fail(nullptr, "%s of %u bytes at %s:%d", what, size, file, line);
    if (size > 0) memcpy(current->given, value, size);
    exchange(what, mask, source, 0, file, line);
    if (size > 0) memcpy(result, current->received, size);
}

unsigned emulated_ballot(const char* what, unsigned mask, int predicate, const char* file, int line) {
    exchange(what, mask, -1, predicate, file, line);
    return current->votes;
}

void emulated_access(const void* p, size_t size, size_t alignment, bool write, const void* pc) {
    if ((uintptr_t)p % alignment != 0)
        fail(pc, "misaligned: address %#llx is no multiple of %zu", (unsigned long long)(uintptr_t)p, alignment);
    access(p, size, write, pc);
}

void emulated_atomic(const void* p, size_t size, const void* pc) { access(p, size, true, pc, true); }

// Fails as a compiler does for devices without clusters, for which it does not know the functions of clusters.
static void need_clusters(const char* what, const char* file, int line) {
    if (!launch.has_clusters)
        fail(nullptr, "identifier %s is undefined before compute capability 9.0, at %s:%d", what, file, line);
}

void emulated_cluster_arrive(const char* what, bool releases, const char* file, int line) {
    need_clusters(what, file, line);
    arrive(what, releases, file, line);
}

void emulated_cluster_wait(const char* file, int line) {
    need_clusters("__cluster_barrier_wait", file, line);
    wait_for_cluster(file, line);
}

unsigned emulated_cluster_rank(const char* file, int line) {
    need_clusters("__clusterRelativeBlockRank", file, line);
    return (unsigned)(block - launch.blocks.data());
}

unsigned emulated_cluster_size(const char* file, int line) {
    need_clusters("__clusterSizeInBlocks", file, line);
    return (unsigned)launch.blocks.size();
}

void* emulated_map_shared(const void* p, unsigned rank, const char* file, int line) {
    const uintptr_t address = (uintptr_t)p;
    need_clusters("__cluster_map_shared_rank", file, line);
    if (rank >= launch.blocks.size())
        fail(nullptr, "__cluster_map_shared_rank with rank %u in a cluster of %zu, at %s:%d", rank,
             launch.blocks.size(), file, line);
    if (!in_shared(address))
        fail(nullptr, "__cluster_map_shared_rank of an address that is not in the block's shared memory, at %s:%d",
             file, line);
    return &launch.blocks[rank] == block ? (void*)p : in_image(launch.blocks[rank], address);
}

void emulated_copy(void* to, const void* from, size_t size, size_t zeros, const void* pc) {
    start_copy({to, from, size, size - zeros, 0, pc, {}});
}

void emulated_commit_copies() { current->groups++; }

void emulated_wait_for_copies(unsigned latest) { finish_copies(latest); }

// ---------------------------------------------------------------------------------------------------------------------
// The functions that code compiled with -fsanitize=thread calls

#define ACCESS(name, size, write) \
    void name(void* p) { access(p, size, write, __builtin_return_address(0)); }
#define ACCESSES(size)                              \
    ACCESS(__tsan_read##size, size, false)          \
    ACCESS(__tsan_write##size, size, true)          \
    ACCESS(__tsan_unaligned_read##size, size, false) \
    ACCESS(__tsan_unaligned_write##size, size, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, size_t size) { access(p, size, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t size) { access(p, size, true, __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// ---------------------------------------------------------------------------------------------------------------------
// The functions that code compiled with -fsanitize=undefined calls. Their data begin with the place in the source;
// "abort" in a name means that the kernel does not go on

struct Place {
    const char* file;
    unsigned line, column;
};
struct Mismatch {
    Place place;
    const void* type;
    unsigned char log_alignment, kind;
};

void __ubsan_handle_type_mismatch_v1_abort(Mismatch* data, uintptr_t p) {
    if ((p & ((1ull << data->log_alignment) - 1)) == 0)
        fail(nullptr, "null pointer at %s:%u", data->place.file, data->place.line);
    fail(nullptr, "misaligned: address %#llx is no multiple of %u at %s:%u", (unsigned long long)p,
         1u << data->log_alignment, data->place.file, data->place.line);
}
void __ubsan_handle_out_of_bounds_abort(Place* place, uintptr_t index) {
    fail(nullptr, "out of bounds: index %lld of an array at %s:%u", (long long)index, place->file, place->line);
}
#define HANDLER(name, text) \
    void __ubsan_handle_##name(Place* place) { fail(nullptr, text " at %s:%u", place->file, place->line); }
HANDLER(add_overflow_abort, "integer overflow in an addition")
HANDLER(sub_overflow_abort, "integer overflow in a subtraction")
HANDLER(mul_overflow_abort, "integer overflow in a multiplication")
HANDLER(negate_overflow_abort, "integer overflow in a negation")
HANDLER(divrem_overflow_abort, "integer division by zero or overflow")
HANDLER(shift_out_of_bounds_abort, "shift out of bounds")
HANDLER(load_invalid_value_abort, "a bool or enum that holds no such value")
HANDLER(missing_return, "end of a function that returns a value")
HANDLER(builtin_unreachable, "unreachable place reached")

}  // extern "C"
