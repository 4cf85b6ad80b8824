// The team of threads: every task once, barriers that order, sleeping and waking.
#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
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

// Whether all threads of the process but the caller come to sleep.
bool others_sleep() {
    for (int attempt = 0; attempt < 2000; ++attempt) {
        bool awake = false;
        for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
            if (task.path().filename() == std::to_string(gettid())) continue;
            std::ifstream file(task.path() / "stat");
            std::string text;
            std::getline(file, text);  // number (name) state ...
            const size_t name_end = text.rfind(')');
            awake = awake || name_end == std::string::npos || text[name_end + 2] != 'S';
        }
        if (!awake) return true;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
}

// A thread that waits for work, or for the others at a barrier, sleeps in the end, and is woken.
void test_sleeping(int num_spins) {
    Pool pool(4, nullptr, num_spins);
    const auto wait_for_one = [](Team& team, const void*) {
        if (team.thread() == 2) CHECK(others_sleep(), "at a barrier");
        team.barrier();
    };
    for (int round = 0; round < 5; ++round) {
        CHECK(others_sleep(), "without work");
        pool.run(wait_for_one, nullptr);
    }
}

void test_tasks(int num_threads, int num_spins) {
    Pool pool(num_threads, nullptr, num_spins);
    Counting c(37);
    int expected = 0;
    for (int round = 1; round <= 200; ++round) {
        pool.run(ops, &c);
        expected += round;
    }
    for (const auto& count : c.taken) CHECK(count == expected, "%d, not %d", count.load(), expected);
}

void test_memory() {
    Pool pool(2, nullptr);
    CHECK(pool.reserve(1000, 5 << 20));
    const int64_t bytes = pool.scratch_bytes();
    CHECK(bytes >= 2000 + (5 << 20));
    CHECK(pool.reserve(10, 10) && pool.scratch_bytes() == bytes);  // never shrinks
}

// Memory that could not be had leaves what there was.
void test_no_memory() {
    constexpr int64_t kTooMuch = int64_t{1} << 60;
    Pool pool(2, nullptr);
    CHECK(pool.reserve(1000, 2000));
    const auto mark = [](Team& team, const void*) {
        memset(team.scratch(), 7, 1000);
        if (team.thread() == 0) memset(team.shared_scratch(), 7, 2000);
    };
    pool.run(mark, nullptr);
    const int64_t bytes = pool.scratch_bytes();
    CHECK(!pool.reserve(kTooMuch, 0) && !pool.reserve(0, kTooMuch));
    CHECK(pool.holds(1000, 2000) && pool.scratch_bytes() == bytes);
    const auto look = [](Team& team, const void*) {
        CHECK(team.scratch() && team.scratch()[999] == 7);
        CHECK(team.shared_scratch() && team.shared_scratch()[1999] == 7);
    };
    if (pool.holds(1000, 2000)) pool.run(look, nullptr);
}

}  // namespace

int main() {
    for (const int num_spins : {0, Pool::kSpins}) {
        for (const int num_threads : {1, 2, 3, 8}) test_tasks(num_threads, num_spins);
        test_sleeping(num_spins);
    }
    test_memory();
    test_no_memory();
    if (failures()) std::printf("%d failures\n", failures());
    return failures() != 0;
}
