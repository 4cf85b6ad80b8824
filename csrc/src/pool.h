// A persistent team of threads that walks a program together.
//
// Every thread runs the same code (`Team` tells it who it is); a barrier ends each op. Waiting is
// spinning first, because ops are microseconds apart, and sleeping afterwards, because an engine
// may wait for a request for hours and because a spinning thread must not starve the one it waits
// for when cores are scarce.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace penstock {

constexpr int64_t kAlignment = 64;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Memory in huge pages where the system gives them, aligned to 64 bytes and more, zeroed.
class Memory {
public:
    Memory() = default;
    ~Memory() { release(); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    // Contents are lost when it grows. False: out of memory, and what was there stays.
    bool reserve(int64_t num_bytes);
    char* data() const { return data_; }
    int64_t size() const { return size_; }

private:
    void release();
    char* data_ = nullptr;
    int64_t size_ = 0;
};

class Pool;

// One thread's view of the team; on a cache line of its own, because barriers write to it.
class alignas(kAlignment) Team {
public:
    Team(Pool& pool, int thread) : pool_(pool), thread_(thread) {}
    int thread() const { return thread_; }
    int num_threads() const;
    void barrier();
    // The next of [0, num_tasks) that nobody has taken since the last barrier, or -1.
    int64_t next(int64_t num_tasks);
    char* scratch() const;         // of this thread alone
    char* shared_scratch() const;  // of all threads

private:
    Pool& pool_;
    int thread_;
    bool sense_ = false;
    friend class Pool;
};

class Pool {
public:
    using Job = void (*)(Team&, const void*);

    // About 50 us: longer than the gap between two ops or two steps, much shorter than a time slice.
    static constexpr int kSpins = 2000;

    // Throws std::system_error when the system refuses a thread; none is left behind then.
    Pool(int num_threads, const int32_t* cpus, int num_spins = kSpins);
    ~Pool();
    // Null if jobs can be run, else why not: threads do not follow a process into its fork.
    const char* problem() const;
    void run(Job job, const void* context);
    bool reserve(int64_t thread_bytes, int64_t shared_bytes);
    bool holds(int64_t thread_bytes, int64_t shared_bytes) const;
    int num_threads() const { return num_threads_; }
    int64_t scratch_bytes() const;

private:
    friend class Team;
    void work(int thread, int cpu);
    void wait_while(const std::atomic<uint32_t>& value, uint32_t old) const;
    void stop();

    const int num_threads_;
    const int num_spins_;  // of a waiting thread before it sleeps
    const pid_t process_;
    std::vector<std::thread> workers_;
    std::vector<Team> teams_;
    std::unique_ptr<Memory[]> thread_memory_;
    Memory shared_memory_;
    Job job_ = nullptr;
    const void* context_ = nullptr;

    // Apart from each other, so that waiting threads do not disturb the counting ones.
    alignas(kAlignment) std::atomic<uint32_t> generation_{0};  // a new job; odd bits mean nothing
    alignas(kAlignment) std::atomic<int32_t> num_waiting_{0};
    alignas(kAlignment) std::atomic<uint32_t> sense_{0};
    alignas(kAlignment) std::atomic<int64_t> next_task_{0};
    bool stop_ = false;
};

}  // namespace penstock

struct penstock_pool : penstock::Pool {
    using Pool::Pool;
};
