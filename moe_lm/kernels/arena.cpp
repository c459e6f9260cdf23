// torch's allocator on CPUs, for tensors that are not small; loaded by allocator.py.
//
// A step allocates and frees the same large tensors every time. glibc keeps freed blocks, if told so, but an aligned
// block (torch asks for 64 bytes) never fits the hole that one of its size has left: glibc looks for the size and the
// alignment together. So the heap is in pieces, 15 to 30 % of a step's peak. Here blocks are aligned by their sizes,
// the lowest hole is taken that is large enough, and neighbours are joined at once. What has been touched stays, in
// huge pages where the system has them.
//
// The room for all of it is reserved at once, as much as there is memory, and costs nothing until it is touched. Where
// a process may have only so many addresses (RLIMIT_AS), or the system promises no more than it has, that would leave
// none for others: there is no arena then.

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>

namespace {

constexpr size_t SMALLEST = size_t(1) << 17;  // glibc's own line between its heap and blocks of their own
constexpr size_t LINE = 64;                   // a cache line, which vector instructions like to begin at
constexpr size_t HUGE_PAGE = size_t(1) << 21;

class Arena final : public c10::Allocator {
    char *const begin, *const end;
    char *top, *touched;  // behind the last block, and behind the last one that there ever was since the last `trim`
    std::map<char *, size_t> holes, blocks;

  public:
    std::mutex mutex;

    Arena(char *begin, char *end) : begin(begin), end(end), top(begin), touched(begin) {}

    c10::DataPtr allocate(size_t size) override;
    c10::DeleterFnPtr raw_deleter() const override;
    void copy_data(void *to, const void *from, size_t size) const override { default_copy_data(to, from, size); }

    bool holds(void *where) const { return begin <= where && where < end; }

    // Null if there is no room.
    char *take(size_t size) {
        std::lock_guard<std::mutex> lock(mutex);
        auto hole = holes.begin();
        while (hole != holes.end() && hole->second < size) hole++;
        char *where = top;
        if (hole != holes.end()) {
            where = hole->first;
            if (hole->second > size) holes[where + size] = hole->second - size;
            holes.erase(hole);
        } else if (size_t(end - top) < size) {
            return nullptr;
        } else {
            top += size;
            touched = std::max(touched, top);
        }
        blocks[where] = size;
        return where;
    }

    void give(char *where) {
        std::lock_guard<std::mutex> lock(mutex);
        auto block = blocks.find(where);
        size_t size = block->second;
        blocks.erase(block);
        auto next = holes.lower_bound(where);
        if (next != holes.end() && next->first == where + size) {
            size += next->second;
            next = holes.erase(next);
        }
        if (next != holes.begin() && std::prev(next)->first + std::prev(next)->second == where) {
            where = std::prev(next)->first;
            size += std::prev(next)->second;
            holes.erase(std::prev(next));
        }
        if (where + size == top)
            top = where;
        else
            holes[where] = size;
    }

    // Give the pages of holes back to the system.
    void trim() {
        std::lock_guard<std::mutex> lock(mutex);
        for (auto &[where, size] : holes) forget(where, where + size);
        forget(top, touched);
        touched = top;
    }

  private:
    static void forget(char *from, char *to) {
        uintptr_t page = sysconf(_SC_PAGESIZE), first = (uintptr_t(from) + page - 1) / page * page;
        uintptr_t last = uintptr_t(to) / page * page;
        if (first < last) madvise(reinterpret_cast<void *>(first), last - first, MADV_DONTNEED);
    }
};

Arena *arena = nullptr;  // never destroyed: tensors may be freed after everything else

void give(void *where) {
    if (!arena->holds(where)) return c10::GetDefaultCPUAllocator()->raw_deallocate(where);
    c10::profiledCPUMemoryReporter().Delete(where);
    arena->give(static_cast<char *>(where));
}

c10::DataPtr Arena::allocate(size_t size) {
    void *where = size < SMALLEST ? nullptr : take((size + LINE - 1) / LINE * LINE);
    if (where)
        c10::profiledCPUMemoryReporter().New(where, size);
    else
        where = c10::GetDefaultCPUAllocator()->raw_allocate(size);  // which says what is too much
    return {where, where, ::give, c10::Device(c10::DeviceType::CPU)};
}

c10::DeleterFnPtr Arena::raw_deleter() const { return ::give; }

}  // namespace

// From now on. Returns 0 where there can be none.
extern "C" int arena_use() {
    if (arena) return 1;
    int overcommit = 0;
    std::ifstream("/proc/sys/vm/overcommit_memory") >> overcommit;
    if (overcommit == 2) return 0;
    for (int limited : {RLIMIT_AS, RLIMIT_DATA}) {
        rlimit limit;
        if (getrlimit(__rlimit_resource(limited), &limit) || limit.rlim_cur != RLIM_INFINITY) return 0;
    }
    size_t room = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE)) + HUGE_PAGE;
    void *where = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (where == MAP_FAILED) return 0;
    madvise(where, room, MADV_HUGEPAGE);
    uintptr_t first = (uintptr_t(where) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    arena = new Arena(reinterpret_cast<char *>(first), static_cast<char *>(where) + room);
    // A child must not inherit a lock that another thread holds.
    pthread_atfork([] { arena->mutex.lock(); }, [] { arena->mutex.unlock(); }, [] { arena->mutex.unlock(); });
    c10::SetCPUAllocator(arena);
    return 1;
}

extern "C" void arena_trim() {
    if (arena) arena->trim();
}
