// Threads that share numbered jobs. Which thread does a job never shows in a result: jobs write
// to places of their own, and what they share is added afterwards in the order of their numbers.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace terravox {

class Team {
public:
    explicit Team(int threads) {
        for (int i = 1; i < threads; ++i) helpers_.emplace_back([this] { help(); });
    }

    ~Team() {
        ended_ = true;
        begin_round();
        for (auto &helper : helpers_) helper.join();
    }

    // Calls job(0) .. job(count - 1), each once, and returns when all are done. What a job throws is
    // thrown here once no thread is at work any more; jobs that have not begun are then left out.
    void each(int64_t count, const std::function<void(int64_t)> &job) {
        if (helpers_.empty() || count < 2) {
            for (int64_t i = 0; i < count; ++i) job(i);
            return;
        }
        job_ = &job;
        count_ = count;
        next_ = 0;
        busy_ = int(helpers_.size());
        begin_round();
        take();
        for (int busy; (busy = busy_) != 0;) wait_while(busy_, busy);
        if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

    // The same over [0, size) in pieces of `grain`: job(begin, end).
    template <class Job> void ranges(int64_t size, int64_t grain, const Job &job) {
        each((size + grain - 1) / grain, [&](int64_t i) {
            job(i * grain, std::min(size, (i + 1) * grain));
        });
    }

private:
    // Until `value` is no longer `old`. Most rounds take less time than it takes to wake a thread
    // that sleeps, so it looks again and again for a while first.
    static void wait_while(const std::atomic<int> &value, int old) {
        const auto patience = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
        while (value == old)
            if (std::chrono::steady_clock::now() < patience)
                std::this_thread::yield();
            else
                value.wait(old);
    }

    void begin_round() {
        ++round_;
        round_.notify_all();
    }

    void take() {
        try {
            for (int64_t i; (i = next_.fetch_add(1)) < count_;) (*job_)(i);
        } catch (...) {
            next_ = count_;
            std::lock_guard<std::mutex> hold(lock_);
            failure_ = std::current_exception();
        }
    }

    void help() {
        for (int seen = 0;;) {
            wait_while(round_, seen);
            seen = round_;
            if (ended_) return;
            take();
            if (--busy_ == 0) busy_.notify_one();
        }
    }

    const std::function<void(int64_t)> *job_ = nullptr;
    int64_t count_ = 0;
    std::atomic<int64_t> next_{0};
    std::atomic<int> busy_{0};   // helpers that are still in this round
    std::atomic<int> round_{0};
    std::atomic<bool> ended_{false};
    std::mutex lock_;
    std::exception_ptr failure_;
    std::vector<std::thread> helpers_;
};

}  // namespace terravox
