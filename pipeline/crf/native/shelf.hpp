// Plans that are kept from one call to the next, for features that come again: those of places
// alone are the same for every image of one shape.
//
// A plan is found by its features themselves, so that none can be taken for another. It is lent: who
// takes it has it alone and puts it back, and who finds it gone builds one more.
#pragma once

#include <list>
#include <mutex>

#include "plan.hpp"

namespace terravox {

class Shelf {
public:
    // Holds plans of at most so many bytes together.
    explicit Shelf(size_t most_bytes) : most_(most_bytes) {}

    // The plan of features (d, pixels), normalised; one without pixels where there is none.
    Plan take(const float *features, int d, int64_t pixels) {
        std::lock_guard<std::mutex> hold(lock_);
        for (auto at = kept_.begin(); at != kept_.end(); ++at)
            if (at->is_of(features, d, pixels)) {
                Plan plan = std::move(at->plan);
                kept_.erase(at);
                ++found_;
                return plan;
            }
        return {};
    }

    // The plans that were used last stay.
    void put(const float *features, Plan plan) {
        const size_t count = size_t(plan.d) * plan.pixels;
        Kept kept{{features, features + count}, std::move(plan)};
        if (kept.bytes() > most_) return;
        std::lock_guard<std::mutex> hold(lock_);
        kept_.remove_if([&](const Kept &other) {
            return other.is_of(features, kept.plan.d, kept.plan.pixels);
        });
        kept_.push_front(std::move(kept));
        size_t bytes = 0;
        for (auto at = kept_.begin(); at != kept_.end();)
            at = (bytes += at->bytes()) > most_ ? kept_.erase(at) : std::next(at);
    }

    // How often a plan was found.
    int64_t found() const { return found_; }

private:
    struct Kept {
        std::vector<float> features;
        Plan plan;

        bool is_of(const float *other, int d, int64_t pixels) const {
            return plan.d == d && plan.pixels == pixels &&
                   std::equal(features.begin(), features.end(), other);
        }

        size_t bytes() const { return features.size() * sizeof(float) + plan.bytes(); }
    };

    size_t most_;
    std::list<Kept> kept_;
    std::atomic<int64_t> found_{0};
    std::mutex lock_;
};

}  // namespace terravox
