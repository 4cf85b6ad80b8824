#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

namespace penstock {

namespace {

constexpr int64_t kHugePage = 2 << 20;

// Whoever notifies looks first whether anyone sleeps. Of a weaker store that look could be made before
// the value is visible to a thread that is about to sleep, which would then never be woken.
constexpr std::memory_order kBeforeNotify = std::memory_order_seq_cst;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void pin(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // a wish: refusal costs speed only
}

}  // namespace

bool Memory::reserve(int64_t num_bytes) {
    if (num_bytes <= size_) return true;
    num_bytes = round_up(num_bytes, num_bytes >= kHugePage ? kHugePage : 4096);
    void* data = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return false;
    release();
    madvise(data, num_bytes, MADV_HUGEPAGE);
    data_ = static_cast<char*>(data);
    size_ = num_bytes;
    return true;
}

void Memory::release() {
    if (data_) munmap(data_, size_);
    data_ = nullptr;
    size_ = 0;
}

int Team::num_threads() const { return pool_.num_threads_; }
char* Team::scratch() const { return pool_.thread_memory_[thread_].data(); }
char* Team::shared_scratch() const { return pool_.shared_memory_.data(); }

int64_t Team::next(int64_t num_tasks) {
    if (pool_.num_threads_ == 1) {  // no one to race with; still counted since the last barrier
        int64_t task = pool_.next_task_.load(std::memory_order_relaxed);
        pool_.next_task_.store(task + 1, std::memory_order_relaxed);
        return task < num_tasks ? task : -1;
    }
    int64_t task = pool_.next_task_.fetch_add(1, std::memory_order_relaxed);
    return task < num_tasks ? task : -1;
}

void Team::barrier() {
    if (pool_.num_threads_ == 1) {
        pool_.next_task_.store(0, std::memory_order_relaxed);
        return;
    }
    uint32_t sense = sense_;
    sense_ = !sense_;
    if (pool_.num_waiting_.fetch_add(1, std::memory_order_acq_rel) == pool_.num_threads_ - 1) {
        pool_.num_waiting_.store(0, std::memory_order_relaxed);
        pool_.next_task_.store(0, std::memory_order_relaxed);
        pool_.sense_.store(!sense, kBeforeNotify);
        pool_.sense_.notify_all();
    } else {
        pool_.wait_while(pool_.sense_, sense);
    }
}

Pool::Pool(int num_threads, const int32_t* cpus, int num_spins)
    : num_threads_(num_threads), num_spins_(num_spins), process_(getpid()), thread_memory_(new Memory[num_threads]) {
    teams_.reserve(num_threads);
    for (int thread = 0; thread < num_threads; ++thread) teams_.emplace_back(*this, thread);
    try {
        for (int thread = 1; thread < num_threads; ++thread) {
            workers_.emplace_back(&Pool::work, this, thread, cpus ? cpus[thread] : -1);
        }
    } catch (...) {
        stop();
        throw;
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    stop_ = true;
    generation_.fetch_add(1, kBeforeNotify);
    generation_.notify_all();
    for (auto& worker : workers_) worker.join();
}

const char* Pool::problem() const {
    return getpid() == process_ ? nullptr : "pool: made in another process; make it after the fork";
}

void Pool::wait_while(const std::atomic<uint32_t>& value, uint32_t old) const {
    for (int i = 0; i < num_spins_; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
        relax();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

void Pool::work(int thread, int cpu) {
    if (cpu >= 0) pin(cpu);
    uint32_t seen = 0;
    while (true) {
        wait_while(generation_, seen);
        seen = generation_.load(std::memory_order_acquire);
        if (stop_) return;
        job_(teams_[thread], context_);
        teams_[thread].barrier();
    }
}

void Pool::run(Job job, const void* context) {
    job_ = job;
    context_ = context;
    generation_.fetch_add(1, kBeforeNotify);
    generation_.notify_all();
    job(teams_[0], context);
    teams_[0].barrier();
}

bool Pool::reserve(int64_t thread_bytes, int64_t shared_bytes) {
    for (int thread = 0; thread < num_threads_; ++thread) {
        if (!thread_memory_[thread].reserve(thread_bytes)) return false;
    }
    return shared_memory_.reserve(shared_bytes);
}

bool Pool::holds(int64_t thread_bytes, int64_t shared_bytes) const {
    for (int thread = 0; thread < num_threads_; ++thread) {
        if (thread_memory_[thread].size() < thread_bytes) return false;
    }
    return shared_memory_.size() >= shared_bytes;
}

int64_t Pool::scratch_bytes() const {
    int64_t total = shared_memory_.size();
    for (int thread = 0; thread < num_threads_; ++thread) total += thread_memory_[thread].size();
    return total;
}

}  // namespace penstock
