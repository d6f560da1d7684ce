// The permutohedral lattice (Adams, Baek and Davis, 2010): where pixels lie in it, and its vertices.
//
// Features of D dimensions are embedded in the hyperplane x_0 + .. + x_D = 0, whose lattice A*_D
// cuts space into simplices of D + 1 vertices. A pixel spreads over the vertices of its simplex by
// barycentric weights; vertices exist only where some pixel touches them. This file works in
// float32 in a fixed order and without contraction (-ffp-contract=off): which simplex a pixel falls
// into is decided by its roundings, and so must not change with compiler flags or processor.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include <sys/mman.h>

#include "team.hpp"

namespace terravox {

constexpr int MOST_FEATURES = 24;
constexpr int LANES = 16;           // pixels that are embedded side by side
constexpr int64_t PART = 1 << 15;   // pixels that one job takes; fixed, since it orders the sums
constexpr int32_t ZERO_ROW = 0;     // the row of a vertex that does not exist: always zero

constexpr double ROUNDED = 1 << 22; // float32 below it are rounded by an addition

using Wide = unsigned __int128;

// Memory in huge pages where the system grants them: rows are read in no order, and with pages of
// 4 KB each would be looked up as well.
template <class T> struct HugePages {
    using value_type = T;
    HugePages() = default;
    template <class U> HugePages(const HugePages<U> &) {}

    static constexpr size_t PAGE = size_t(1) << 21;

    static size_t align_of(size_t bytes) { return bytes < PAGE ? 64 : PAGE; }

    // What `count` of them take.
    static size_t bytes(size_t count) {
        const size_t align = align_of(count * sizeof(T));
        return (count * sizeof(T) + align - 1) / align * align;
    }

    T *allocate(size_t count) {
        const size_t align = align_of(count * sizeof(T));
        void *place = std::aligned_alloc(align, bytes(count));
        if (!place) throw std::bad_alloc();
        if (align == PAGE) madvise(place, bytes(count), MADV_HUGEPAGE);
        return static_cast<T *>(place);
    }

    void deallocate(T *place, size_t) { std::free(place); }
    // Numbers are not set before they are written, so that a page belongs to the thread that does.
    void construct(T *place) { ::new (static_cast<void *>(place)) T; }
    template <class... Given> void construct(T *place, Given &&...given) {
        ::new (static_cast<void *>(place)) T(std::forward<Given>(given)...);
    }
    template <class U> bool operator==(const HugePages<U> &) const { return true; }
    template <class U> bool operator!=(const HugePages<U> &) const { return false; }
};

template <class T> using Large = std::vector<T, HugePages<T>>;

// Bytes of memory that a vector has.
template <class T> size_t held(const Large<T> &large) { return HugePages<T>::bytes(large.capacity()); }
template <class T> size_t held(const std::vector<T> &small) { return sizeof(T) * small.capacity(); }

// Where the D stored coordinates of a vertex lie in one integer, with the least of each taken off.
// Steps along the lattice are then additions of constants.
struct Packing {
    int d = 0;
    int bits = 0;
    std::array<int64_t, MOST_FEATURES> least{};
    std::array<int, MOST_FEATURES + 1> shift{};

    // From the least and greatest value of each feature, after `scale`.
    static Packing of(const std::vector<float> &low, const std::vector<float> &high) {
        Packing packing;
        packing.d = int(low.size());
        const int d = packing.d;
        for (int i = 0; i <= d; ++i) {
            // Coordinate i is the sum of the features from i on, less i times the one before.
            double least = 0, most = 0;
            for (int k = i; k < d; ++k) least += low[k], most += high[k];
            if (i > 0) least -= double(i) * high[i - 1], most -= double(i) * low[i - 1];
            // A simplex reaches d + 1 from its pixel's rounding, a neighbour d further.
            const double margin = 4.0 * (d + 1);
            // Beyond, embed() no longer rounds to the nearest, and ranks leave their range.
            if (!(std::max(-least, most) + margin < ROUNDED * (d + 1)))
                throw std::overflow_error("features lie beyond what float32 can place");
            if (i == d) break;  // follows from the others
            packing.least[i] = int64_t(std::floor(least - margin));
            const auto span = uint64_t(int64_t(std::ceil(most + margin)) - packing.least[i]);
            packing.shift[i] = packing.bits;
            packing.bits += 64 - __builtin_clzll(span);
        }
        if (packing.bits > 128) throw std::overflow_error("lattice keys take more than 128 bits");
        return packing;
    }

    // What was packed: D + 1 coordinates, which sum to 0.
    std::array<int64_t, MOST_FEATURES + 1> coordinates(Wide key) const {
        std::array<int64_t, MOST_FEATURES + 1> found{};
        for (int i = 0; i < d; ++i) {
            const int end = i + 1 < d ? shift[i + 1] : bits;
            const Wide field = (key >> shift[i]) & ((Wide(1) << (end - shift[i])) - 1);
            found[i] = int64_t(field) + least[i];
            found[d] -= found[i];
        }
        return found;
    }

    template <class Key> Key unit(int i) const { return i < d ? Key(1) << shift[i] : Key(0); }

    template <class Key> Key ones() const {
        Key sum = 0;
        for (int i = 0; i < d; ++i) sum += unit<Key>(i);
        return sum;
    }
};

// Vertices by key, numbered in the order in which they came, from 0.
template <class Key> class Numbering {
public:
    explicit Numbering(size_t expected = 1024) { resize(expected); }

    size_t size() const { return keys_.size(); }
    size_t bytes() const { return held(keys_) + held(slots_); }
    const std::vector<Key> &keys() const { return keys_; }
    std::vector<Key> only_keys() && { return std::move(keys_); }
    void prefetch(Key key) const { __builtin_prefetch(&slots_[home(key)]); }

    int32_t find(Key key) const {
        for (size_t at = home(key);; at = (at + 1) & mask_) {
            const Slot &slot = slots_[at];
            if (slot.number < 0 || slot.key == key) return slot.number;
        }
    }

    // The number of `key`, which is new exactly when it equals the size before the call.
    int32_t number(Key key) {
        for (size_t at = home(key);; at = (at + 1) & mask_) {
            Slot &slot = slots_[at];
            if (slot.number >= 0) {
                if (slot.key == key) return slot.number;
                continue;
            }
            if (keys_.size() >= size_t(std::numeric_limits<int32_t>::max() / 2))
                throw std::length_error("more than 2^30 lattice vertices");
            slot.key = key;
            slot.number = int32_t(keys_.size());
            keys_.push_back(key);
            const int32_t given = slot.number;
            if (keys_.size() * 2 > slots_.size()) resize(keys_.size());
            return given;
        }
    }

private:
    struct Slot {
        Key key;
        int32_t number;
    };

    size_t home(Key key) const {
        uint64_t folded = uint64_t(key);
        if constexpr (sizeof(Key) > 8) folded ^= uint64_t(key >> 64) * 0xC2B2AE3D27D4EB4Full;
        return (folded * 0x9E3779B97F4A7C15ull) >> down_;
    }

    void resize(size_t expected) {
        int log = 4;
        while ((size_t(1) << log) < 2 * expected) ++log;
        mask_ = (size_t(1) << log) - 1;
        down_ = 64 - log;
        Large<Slot>().swap(slots_);  // all is in keys_: one table at a time
        slots_.assign(mask_ + 1, Slot{Key(0), -1});
        for (size_t i = 0; i < keys_.size(); ++i) {
            size_t at = home(keys_[i]);
            while (slots_[at].number >= 0) at = (at + 1) & mask_;
            slots_[at] = Slot{keys_[i], int32_t(i)};
        }
    }

    std::vector<Key> keys_;
    Large<Slot> slots_;
    size_t mask_ = 0;
    int down_ = 0;
};

// Features scaled so that the blur has unit deviation.
inline std::vector<float> scales(int d) {
    std::vector<float> scale(d);
    const float unit = float(std::sqrt(2.0 / 3.0) * (d + 1));
    for (int i = 0; i < d; ++i) scale[i] = float(unit / std::sqrt(double((i + 1) * (i + 2))));
    return scale;
}

// The simplices of LANES pixels. D stands for the features' number, 0 for one known at run time.
struct Simplices {
    float low[MOST_FEATURES + 1][LANES];     // the simplex's vertex of remainder 0
    float weight[MOST_FEATURES + 1][LANES];  // barycentric, of the vertex of each remainder
    int8_t axis[MOST_FEATURES + 1][LANES];   // the coordinate that has this rank

    // `feature[k]` points to LANES values of feature k, already scaled.
    template <int D> void embed(int dims, const float (*feature)[LANES]) {
        const int d = D ? D : dims;
        float height[MOST_FEATURES + 1][LANES];
        int32_t rank[MOST_FEATURES + 1][LANES] = {};
        float total[LANES] = {}, excess[LANES] = {};
        for (int j = d; j > 0; --j)
            for (int l = 0; l < LANES; ++l) {
                const float value = feature[j - 1][l];
                height[j][l] = total[l] - float(j) * value;
                total[l] += value;
            }
        for (int l = 0; l < LANES; ++l) height[0][l] = total[l];
        const float down = 1.0f / float(d + 1), up = float(d + 1);
        for (int i = 0; i <= d; ++i)
            for (int l = 0; l < LANES; ++l) {
                constexpr float HALF_EVEN = 12582912.0f;  // 1.5 * 2^23: adding it rounds to even
                const float whole = (height[i][l] * down + HALF_EVEN) - HALF_EVEN;
                low[i][l] = whole * up;
                excess[l] += whole;
            }
        for (int i = 0; i < d; ++i)
            for (int j = i + 1; j <= d; ++j)
                for (int l = 0; l < LANES; ++l) {
                    const int32_t less = height[i][l] - low[i][l] < height[j][l] - low[j][l];
                    rank[i][l] += less;
                    rank[j][l] += 1 - less;
                }
        float sorted[MOST_FEATURES + 1][LANES];
        for (int i = 0; i <= d; ++i) {
            float away[LANES];
            for (int l = 0; l < LANES; ++l) {  // back into the hyperplane
                const int32_t moved = rank[i][l] + int32_t(excess[l]);
                const int32_t turn = (moved < 0) - (moved > d);
                rank[i][l] = moved + turn * (d + 1);
                low[i][l] += float(turn) * up;
                away[l] = (height[i][l] - low[i][l]) * down;
            }
            for (int l = 0; l < LANES; ++l) {
                sorted[rank[i][l]][l] = away[l];
                axis[rank[i][l]][l] = int8_t(i);
            }
        }
        for (int l = 0; l < LANES; ++l) weight[0][l] = sorted[d][l] + (1.0f - sorted[0][l]);
        for (int r = 1; r <= d; ++r)
            for (int l = 0; l < LANES; ++l) weight[r][l] = sorted[d - r][l] - sorted[d - r + 1][l];
    }

    // Keys of the simplex of lane l, by remainder: each step adds one to all coordinates and
    // takes d + 1 off the one that is highest.
    template <int D, class Key> void keys(int l, const Packing &packing, Key *key) const {
        const int d = D ? D : packing.d;
        Key at = 0;
        for (int i = 0; i < d; ++i) at += Key(int64_t(low[i][l]) - packing.least[i]) << packing.shift[i];
        const Key ones = packing.ones<Key>();
        key[0] = at;
        for (int r = 1; r <= d; ++r)
            key[r] = at += ones - Key(d + 1) * packing.unit<Key>(axis[d - r + 1][l]);
    }
};

}  // namespace terravox
