// The checks of every access to memory: bounds, memory that nobody wrote, races; and the count of its bytes.
#pragma once
#include "launch.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Races

// The epoch below which all that the thread did lies before the cluster's barrier number `known`, which the current
// thread knows to be over: that is the last barrier, or the last but one.
inline uint32_t released(const Thread& thread, uint32_t known) {
    return known == launch.phase ? thread.released : thread.released_before;
}

// Whether a barrier of the cluster lies between an earlier access by one of its threads and the current thread's.
inline bool cluster_orders(const Access& before) {
    return before.epoch < released(*pool[before.thread - launch.first_thread], current->known);
}

// The distance between the thread of an earlier access and the current one: 0 if the order of their accesses is known,
// else 1 in one warp, 2 in one block, 3 in different blocks. Shared memory of other clusters is not the same memory.
__attribute__((noinline)) int distance_to(const Access& before, bool global) {
    const uint32_t number = before.thread - block->first_thread;
    if (number >= launch.threads) {
        if (!of_cluster(before.thread)) return before.thread && global ? 3 : 0;
        return cluster_orders(before) ? 0 : 3;
    }
    if (before.epoch < block->barrier || number == current->number) return 0;
    if (launch.phase > 0 && cluster_orders(before)) return 0;
    if (number / 32 != current->number / 32) return 2;
    return before.epoch >= current->seen[number % 32];
}

// The same as distance_to, with the usual cases in front: nobody was here before, or this thread, or the block before
// its last barrier. It is inlined, as is its caller: half of the time of a launch is spent here.
__attribute__((always_inline)) inline int unordered(const Access& before, bool global) {
    const uint32_t number = before.thread - block->first_thread;
    if (before.thread == 0 || number == current->number) return 0;
    if (number < launch.threads && before.epoch < block->barrier) return 0;
    return distance_to(before, global);
}

[[noreturn]] __attribute__((cold, noinline)) void fail_race(const Access& before, bool wrote, bool write, const char* name, const void* pc) {
    const bool of_peer = before.thread - block->first_thread >= launch.threads && of_cluster(before.thread);
    fail(pc, "race on %s: %s what %s has %s, with no %sbarrier between them", name, write ? "writes" : "reads",
         describe(before.thread).text, wrote ? "written" : "read", of_peer ? "cluster " : "");
}

__attribute__((always_inline)) inline void check_race(History& history, bool write, bool atomic, bool global,
                                                      const char* name, const void* pc) {
    const Access now = {block->first_thread + current->number, current->epoch, atomic, false};
    if (unordered(history.write, global) && !(history.write.atomic && atomic))
        fail_race(history.write, true, write, name, pc);
    if (write) {
        if (unordered(history.read, global)) fail_race(history.read, false, true, name, pc);
        if (unordered(history.other_read, global)) fail_race(history.other_read, false, true, name, pc);
        history = {now, {}, {}};
        return;
    }
    if (history.read.thread != now.thread) {
        // An earlier read that lies before this one need not be kept: whatever comes after this one comes after it,
        // too. Of reads whose order is not known, the one by the more distant thread is kept.
        const int distance = unordered(history.read, global);
        if (distance > 0 && distance >= unordered(history.other_read, global)) history.other_read = history.read;
    }
    history.read = now;
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory

// The shared memory of the block whose turn it is lies in the module's zeroed statics; that of the cluster's other
// blocks is kept in these images. They lie so far apart that an address just out of bounds is in no image.
constexpr unsigned MOST_BLOCKS = 8;
constexpr size_t IMAGE = 1 << 20, MARGIN = 256 << 10;
alignas(4096) char images[MOST_BLOCKS * IMAGE];

// The address in a block's image that stands for an address of shared memory; its alignment is the same.
char* in_image(const Block& owner, uintptr_t address) {
    return images + (&owner - launch.blocks.data()) * IMAGE + MARGIN + launch.shared_begin % 4096 +
           (address - launch.shared_begin);
}

constexpr const char* OWN = "shared memory";

bool in_shared(uintptr_t address) { return launch.shared_begin <= address && address < launch.shared_end; }

void access_shared(Shadow& shadow, const char* name, uintptr_t address, size_t size, bool write, bool atomic,
                   const void* pc) {
    if (address + size > launch.shared_end || (launch.dynamic_begin <= address && address < launch.dynamic_limit &&
                                               address + size > launch.dynamic_end))
        fail(pc, "out of bounds: %zu bytes %s past the end of %s", size, write ? "written" : "read", name);
    History* history = shadow.at(address, size);
    for (size_t i = 0; i < size; i += shadow.granule, history++) {
        const Access& last = history->write;
        // Other clusters had the same addresses for other memory, so their writes do not count.
        if ((!write || atomic) && !of_cluster(last.thread))
            fail(pc, "uninitialised: %zu bytes of %s read that nobody has written", size, name);
        if (last.pending && of_cluster(last.thread))
            fail(pc, write ? "race on %s: %zu bytes written while a copy to them is on its way"
                           : "uninitialised: of %s, %zu bytes read while a copy to them is on its way", name, size);
        check_race(*history, write, atomic, false, name, pc);
    }
}

void access_peer(uintptr_t address, size_t size, bool write, bool atomic, const void* pc) {
    const char* verb = write ? "written" : "read";
    const uintptr_t rank = (address - (uintptr_t)images) / IMAGE;
    if (rank >= launch.blocks.size())
        fail(pc, "out of bounds: %zu bytes %s past the end of a peer's shared memory", size, verb);
    Block& owner = launch.blocks[rank];
    const uintptr_t begin = (uintptr_t)in_image(owner, launch.shared_begin);
    if (address < begin) fail(pc, "out of bounds: %zu bytes %s before the begin of a peer's shared memory", size, verb);
    if (&owner == block)
        fail(pc, "%zu bytes of its own shared memory %s by the address that a peer has for them", size, verb);
    if (current->known == 0)
        fail(pc, "too early: a peer's shared memory %s before a barrier of the cluster: %s may not have started", verb,
             describe(owner).text);
    if (owner.done == launch.threads)
        fail(pc, "too late: a peer's shared memory %s when %s has left", verb, describe(owner).text);
    owner.visits[block->first_thread - launch.first_thread + current->number] = {current->epoch, pc};
    access_shared(owner.shared, "a peer's shared memory", launch.shared_begin + (address - begin), size, write, atomic,
                  pc);
}

// Checks that nobody can touch the shared memory of a block after it has left: all visits of peers must lie before a
// barrier of the cluster that the block has waited for.
void check_visits(const Block& leaving) {
    uint32_t known = 0;
    for (unsigned i = 0; i < launch.threads; i++) known = std::max(known, leaving.threads[i]->known);
    for (unsigned i = 0; i < leaving.visits.size(); i++) {
        const Visit& visit = leaving.visits[i];
        if (!visit.pc || visit.epoch < released(*pool[i], known)) continue;
        launch.result->pc = visit.pc;
        return report("too late: a peer's shared memory touched when %s may have left: it has left with no cluster "
                      "barrier since, in %s", describe(leaving).text, describe(launch.first_thread + i).text);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Global memory

[[noreturn]] void fail_outside(uintptr_t address, size_t size, bool write, const void* pc) {
    char nearest[200] = "no argument is near";
    uintptr_t least = 1 << 20;
    for (const Range& range : launch.ranges) {
        const bool before = address < range.begin;
        const uintptr_t distance = before ? range.begin - address : address + size - range.end;
        if (distance >= least) continue;
        least = distance;
        snprintf(nearest, sizeof nearest, before ? "%zu bytes before the begin of %s" : "%zu bytes past the end of %s",
                 (size_t)distance, range.name);
    }
    fail(pc, "out of bounds: %zu bytes %s (%s)", size, write ? "written" : "read", nearest);
}

bool all_set(const unsigned char* flags, size_t size) {
    for (; size >= 8; flags += 8, size -= 8) {
        uint64_t word;
        memcpy(&word, flags, 8);
        if (word != 0x0101010101010101) return false;
    }
    for (; size > 0; flags++, size--)
        if (!*flags) return false;
    return true;
}

void access_global(uintptr_t address, size_t size, bool write, bool atomic, const void* pc) {
    size_t i = launch.last_range;
    const auto inside = [&](const Range& range) { return range.begin <= address && address + size <= range.end; };
    if (i >= launch.ranges.size() || !inside(launch.ranges[i])) {
        for (i = 0; i < launch.ranges.size() && !inside(launch.ranges[i]);) i++;
        if (i == launch.ranges.size()) fail_outside(address, size, write, pc);
        launch.last_range = i;
    }
    Range& range = launch.ranges[i];
    unsigned char* initialised = range.initialised + (address - range.begin);
    if ((!write || atomic) && !all_set(initialised, size))
        fail(pc, "uninitialised: %zu bytes of %s read that nobody has written", size, range.name);
    if (write) memset(initialised, 1, size);
    if (!write || atomic) launch.result->bytes_read += size;
    if (write) launch.result->bytes_written += size;
    History* history = range.shadow.at(address, size);
    for (size_t k = 0; k < size; k += range.shadow.granule)
        check_race(*history++, write, atomic, true, range.name, pc);
}

// ---------------------------------------------------------------------------------------------------------------------
// All memory

inline void count_access(const void* pc) {
    if (++launch.accesses > MOST_ACCESSES) fail(pc, "endless loop: %llu accesses to memory", (unsigned long long)MOST_ACCESSES);
}

inline void access(const void* p, size_t size, bool write, const void* pc, bool atomic = false) {
    const uintptr_t address = (uintptr_t)p;
    if (address - stack_begin < STACK) return;  // local variables of the thread
    count_access(pc);
    if (in_shared(address))
        access_shared(block->shared, OWN, address, size, write, atomic, pc);
    else if (address - (uintptr_t)images < sizeof images)
        access_peer(address, size, write, atomic, pc);
    else
        access_global(address, size, write, atomic, pc);
}

// ---------------------------------------------------------------------------------------------------------------------
// Copies that go on while the thread works

void set_pending(const Copy& copy, bool pending) {
    History* history = block->shared.at((uintptr_t)copy.to, copy.size);
    for (size_t i = 0; i < copy.size; i += block->shared.granule) history++->write.pending = pending;
}

void start_copy(const Copy& order) {
    Copy copy = order;
    const uintptr_t to = (uintptr_t)copy.to, from = (uintptr_t)copy.from;
    if ((copy.size != 4 && copy.size != 8 && copy.size != 16) || copy.taken > copy.size)
        fail(copy.pc, "a copy of %zu bytes: expected 4, 8 or 16, and no more zeros than that", copy.size);
    if ((to | from) % copy.size != 0)
        fail(copy.pc, "misaligned: a copy of %zu bytes from address %#zx to %#zx", copy.size, (size_t)from, (size_t)to);
    if (!in_shared(to)) fail(copy.pc, "a copy to an address that is not in the block's shared memory");
    if (in_shared(from)) fail(copy.pc, "a copy from an address that is not in global memory");
    count_access(copy.pc);
    if (copy.taken > 0) access_global(from, copy.taken, false, false, copy.pc);
    access_shared(block->shared, OWN, to, copy.size, true, false, copy.pc);
    set_pending(copy, true);
    memset(copy.value, 0, sizeof copy.value);
    memcpy(copy.value, copy.from, copy.taken);
    copy.group = current->groups;
    current->copies.push_back(copy);
}

// Ends a copy that the thread has waited for: only now are the bytes written.
void finish_copy(const Copy& copy) {
    if (memcmp(copy.value, copy.from, copy.taken) != 0)
        fail(copy.pc, "race: what a copy reads was written while the copy was on its way");
    set_pending(copy, false);
    access_shared(block->shared, OWN, (uintptr_t)copy.to, copy.size, true, false, copy.pc);
    memcpy(copy.to, copy.value, copy.size);
}

// Ends the copies of all groups that are committed, but for the latest ones.
void finish_copies(uint32_t latest) {
    std::vector<Copy>& copies = current->copies;
    size_t finished = 0;
    while (finished < copies.size() && copies[finished].group + latest < current->groups)
        finish_copy(copies[finished++]);
    copies.erase(copies.begin(), copies.begin() + finished);
}

}  // namespace
