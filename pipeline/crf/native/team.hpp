// Threads that share numbered jobs. Which thread does a job never shows in a result: jobs write
// to places of their own, and what they share is added afterwards in the order of their numbers.
#pragma once

#include <atomic>
#include <condition_variable>
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
        {
            std::lock_guard<std::mutex> hold(lock_);
            ended_ = true;
        }
        wake_.notify_all();
        for (auto &helper : helpers_) helper.join();
    }

    // Calls job(0) .. job(count - 1), each once, and returns when all are done. What a job throws is
    // thrown here once no thread is at work any more; jobs that have not begun are then left out.
    void each(int64_t count, const std::function<void(int64_t)> &job) {
        if (helpers_.empty() || count < 2) {
            for (int64_t i = 0; i < count; ++i) job(i);
            return;
        }
        {
            std::lock_guard<std::mutex> hold(lock_);
            job_ = &job;
            count_ = count;
            next_ = 0;
            busy_ = helpers_.size();
            ++round_;
        }
        wake_.notify_all();
        take(job, count);
        std::unique_lock<std::mutex> hold(lock_);
        done_.wait(hold, [this] { return busy_ == 0; });
        if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

    // The same over [0, size) in pieces of `grain`: job(begin, end).
    template <class Job> void ranges(int64_t size, int64_t grain, const Job &job) {
        each((size + grain - 1) / grain, [&](int64_t i) {
            job(i * grain, std::min(size, (i + 1) * grain));
        });
    }

private:
    void take(const std::function<void(int64_t)> &job, int64_t count) {
        try {
            for (int64_t i; (i = next_.fetch_add(1)) < count;) job(i);
        } catch (...) {
            next_ = count;
            std::lock_guard<std::mutex> hold(lock_);
            failure_ = std::current_exception();
        }
    }

    void help() {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> hold(lock_);
        for (;;) {
            wake_.wait(hold, [&] { return ended_ || round_ != seen; });
            if (ended_) return;
            seen = round_;
            const auto *job = job_;
            const int64_t count = count_;
            hold.unlock();
            take(*job, count);
            hold.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex lock_;
    std::condition_variable wake_, done_;
    const std::function<void(int64_t)> *job_ = nullptr;
    int64_t count_ = 0;
    std::atomic<int64_t> next_{0};
    size_t busy_ = 0;
    uint64_t round_ = 0;
    bool ended_ = false;
    std::exception_ptr failure_;
    std::vector<std::thread> helpers_;
};

}  // namespace terravox
