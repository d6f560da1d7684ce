// What is worked out once about one kernel's features: rows of a table for the vertices, which rows
// a pixel touches and how much, which rows are neighbours.
//
// Pixels come in parts of PART. A vertex belongs to the first part that touches it. A later part
// adds to a row of its own instead, a mirror, which is added to the vertex's row when all parts are
// through, in the order of the parts; so parts may run at the same time, and sums do not depend on
// how many do. Rows: 0 is always zero, then the vertices, then the mirrors.
#pragma once

#include <memory>

#include "lattice.hpp"

namespace terravox {

struct Plan {
    int d = 0;
    int64_t pixels = 0;
    int64_t vertices = 0;
    Large<int32_t> row;           // (pixels, d + 1)
    Large<float> weight;          // (pixels, d + 1)
    Large<int32_t> neighbour;     // (d + 1, vertices, 2); ZERO_ROW where there is none
    std::vector<int32_t> mirrored;      // the vertex's row of each mirror, in the order of the parts
    std::vector<int32_t> by_owner;      // mirrors, grouped by the part that their vertex belongs to
    std::vector<int64_t> owner_begin;   // where in by_owner each part's begin, and the end

    int64_t parts() const { return (pixels + PART - 1) / PART; }
    int64_t rows() const { return 1 + vertices + int64_t(mirrored.size()); }
    size_t bytes() const {
        return held(row) + held(weight) + held(neighbour) + held(mirrored) + held(by_owner);
    }
    float gain() const { return 1.0f / (1.0f + std::ldexp(1.0f, -d)); }

    // A plan with neighbours. features: (d, pixels), C-ordered.
    static Plan of(const float *features, int d, int64_t pixels, Team &team);

    // Rows and weights of the pixels; the vertices' keys, in the order of their rows.
    template <class Key>
    Numbering<Key> place(const float *features, const Packing &packing, Team &team);

    // The neighbours of `numbering`'s vertices.
    template <class Key>
    void link(const Numbering<Key> &numbering, const Packing &packing, Team &team);

private:
    template <int D, class Key>
    std::vector<Key> touch(const float *features, const Packing &packing, int64_t part);
};

inline Plan Plan::of(const float *features, int d, int64_t pixels, Team &team) {
    if (d < 1 || d > MOST_FEATURES) throw std::length_error("1 to 24 features are supported");
    Plan plan;
    plan.d = d;
    plan.pixels = pixels;
    std::vector<float> low(d), high(d);
    const auto scale = scales(d);
    team.each(d, [&](int64_t k) {
        const float *feature = features + k * pixels;
        float least[LANES], most[LANES];  // side by side, as the compiler may not reorder one
        std::fill_n(least, LANES, feature[0]);
        std::fill_n(most, LANES, feature[0]);
        const int64_t whole = pixels / LANES * LANES;
        for (int64_t at = 0; at < whole; at += LANES)
            for (int l = 0; l < LANES; ++l) {
                least[l] = feature[at + l] < least[l] ? feature[at + l] : least[l];
                most[l] = feature[at + l] > most[l] ? feature[at + l] : most[l];
            }
        for (int64_t at = whole; at < pixels; ++at) {
            least[0] = std::min(least[0], feature[at]);
            most[0] = std::max(most[0], feature[at]);
        }
        low[k] = *std::min_element(least, least + LANES) * scale[k];
        high[k] = *std::max_element(most, most + LANES) * scale[k];
    });
    const auto packing = Packing::of(low, high);
    if (packing.bits <= 64)
        plan.link(plan.place<uint64_t>(features, packing, team), packing, team);
    else
        plan.link(plan.place<Wide>(features, packing, team), packing, team);
    return plan;
}

template <class Key>
Numbering<Key> Plan::place(const float *features, const Packing &packing, Team &team) {
    const int64_t count = parts();
    row.resize(pixels * (d + 1));
    weight.resize(pixels * (d + 1));
    std::vector<std::vector<Key>> touched(count);
    team.each(count, [&](int64_t p) {
        switch (d) {
            case 2: touched[p] = touch<2, Key>(features, packing, p); break;
            case 3: touched[p] = touch<3, Key>(features, packing, p); break;
            case 5: touched[p] = touch<5, Key>(features, packing, p); break;
            default: touched[p] = touch<0, Key>(features, packing, p);
        }
    });

    size_t total = 0;
    for (const auto &keys : touched) total += keys.size();
    Numbering<Key> all(total / 2);  // as if each were touched by two parts
    std::vector<std::vector<int32_t>> row_of(count);  // of a part's own numbers; mirrors from -1 down
    std::vector<int64_t> first_row(count + 1);
    for (int64_t p = 0; p < count; ++p) {
        const auto &keys = touched[p];
        first_row[p] = 1 + int64_t(all.size());
        row_of[p].resize(keys.size());
        for (size_t i = 0; i < keys.size(); ++i) {
            if (i + 16 < keys.size()) all.prefetch(keys[i + 16]);
            const int32_t number = all.number(keys[i]);
            const bool owned = 1 + number >= first_row[p];
            if (!owned) mirrored.push_back(1 + number);
            row_of[p][i] = owned ? 1 + number : -int32_t(mirrored.size());
        }
    }
    vertices = int64_t(all.size());
    first_row[count] = 1 + vertices;

    team.each(count, [&](int64_t p) {
        const int64_t begin = p * PART * (d + 1), end = std::min(pixels, (p + 1) * PART) * (d + 1);
        for (int64_t at = begin; at < end; ++at) {
            const int32_t found = row_of[p][row[at]];
            row[at] = found > 0 ? found : int32_t(vertices) - found;
        }
    });
    std::vector<std::vector<int32_t>> grouped(count);
    for (size_t m = 0; m < mirrored.size(); ++m) {
        const auto owner = std::upper_bound(first_row.begin(), first_row.end(), mirrored[m]) - 1;
        grouped[owner - first_row.begin()].push_back(int32_t(1 + vertices + m));
    }
    for (const auto &group : grouped) {
        owner_begin.push_back(int64_t(by_owner.size()));
        by_owner.insert(by_owner.end(), group.begin(), group.end());
    }
    owner_begin.push_back(int64_t(by_owner.size()));
    return all;
}

// Simplices of one part: weights, and in `row` the part's own numbers of the vertices, whose keys
// are returned in their order.
template <int D, class Key>
std::vector<Key> Plan::touch(const float *features, const Packing &packing, int64_t part) {
    const int d = D ? D : this->d;
    Numbering<Key> numbering;
    const auto scale = scales(d);
    const int64_t begin = part * PART, end = std::min(pixels, begin + PART);
    Simplices simplices;
    float feature[MOST_FEATURES][LANES];
    Key key[LANES][MOST_FEATURES + 1];
    for (int64_t at = begin; at < end; at += LANES) {
        const int lanes = int(std::min<int64_t>(LANES, end - at));
        for (int k = 0; k < d; ++k)
            for (int l = 0; l < LANES; ++l)
                feature[k][l] = features[k * pixels + at + std::min(l, lanes - 1)] * scale[k];
        simplices.embed<D>(d, feature);
        for (int l = 0; l < lanes; ++l) {
            simplices.keys<D>(l, packing, key[l]);
            for (int r = 0; r <= d; ++r) numbering.prefetch(key[l][r]);
        }
        for (int l = 0; l < lanes; ++l) {
            const int64_t place = (at + l) * (d + 1);
            for (int r = 0; r <= d; ++r) weight[place + r] = simplices.weight[r][l];
            // The pixel before often lies in the same simplex.
            bool same = l > 0;
            for (int r = 0; r <= d && l; ++r) same &= key[l][r] == key[l - 1][r];
            if (same)
                for (int r = 0; r <= d; ++r) row[place + r] = row[place - d - 1 + r];
            else
                for (int r = 0; r <= d; ++r) row[place + r] = numbering.number(key[l][r]);
        }
    }
    return std::move(numbering).only_keys();
}

template <class Key>
void Plan::link(const Numbering<Key> &numbering, const Packing &packing, Team &team) {
    vertices = int64_t(numbering.size());
    neighbour.assign(2 * (d + 1) * vertices, ZERO_ROW);
    const auto &keys = numbering.keys();
    team.ranges(vertices, 4096, [&](int64_t begin, int64_t end) {
        constexpr int64_t AHEAD = 16;
        for (int j = 0; j <= d; ++j) {
            const Key step = packing.ones<Key>() - Key(d + 1) * packing.unit<Key>(j);
            int32_t *axis = &neighbour[2 * j * vertices];
            for (int64_t i = begin; i < end; ++i) {
                if (i + AHEAD < end) numbering.prefetch(keys[i + AHEAD] - step);
                const int32_t found = numbering.find(keys[i] - step);
                if (found < 0) continue;
                axis[2 * i] = 1 + found;
                axis[2 * int64_t(found) + 1] = int32_t(1 + i);
            }
        }
    });
}

}  // namespace terravox
