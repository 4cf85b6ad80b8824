// The team of threads: every task once, barriers that order, sleeping and waking.
#include "pool.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "check.h"

namespace {

using namespace penstock;

struct Counting {
    std::vector<std::atomic<int>> taken;
    std::vector<int> written;  // by one op, read by the next: only the barrier orders them
    explicit Counting(size_t n) : taken(n), written(n) {}
};

// Three ops: write, then read what others wrote, then count again.
void ops(Team& team, const void* context) {
    auto& c = *const_cast<Counting*>(static_cast<const Counting*>(context));
    const auto n = static_cast<int64_t>(c.taken.size());
    for (int64_t i = team.next(n); i >= 0; i = team.next(n)) c.written[i] += 1;
    team.barrier();
    for (int64_t i = team.next(n); i >= 0; i = team.next(n)) c.taken[i] += c.written[n - 1 - i];
    team.barrier();
    CHECK(team.next(0) == -1);
}

void test_tasks(int num_threads) {
    Pool pool(num_threads, nullptr);
    Counting c(37);
    int expected = 0;
    for (int round = 1; round <= 200; ++round) {
        pool.run(ops, &c);
        expected += round;
        if (round % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // workers fall asleep
    }
    for (const auto& count : c.taken) CHECK(count == expected, "%d, not %d", count.load(), expected);
}

void test_memory() {
    Pool pool(2, nullptr);
    CHECK(pool.reserve(1000, 5 << 20));
    const int64_t bytes = pool.scratch_bytes();
    CHECK(bytes >= 2000 + (5 << 20));
    CHECK(pool.reserve(10, 10) && pool.scratch_bytes() == bytes);  // never shrinks
    CHECK(!pool.reserve(int64_t{1} << 60, 0));
}

}  // namespace

int main() {
    for (const int num_threads : {1, 2, 3, 8}) test_tasks(num_threads);
    test_memory();
    if (failures()) std::printf("%d failures\n", failures());
    return failures() != 0;
}
