// Products with packed weights: what is computed in which order, by which of the kernels, on which thread.
#include "cpu/bitserial.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/bitserial_kernels.h"

namespace csq::cpu {
namespace {

// Batch rows, or output positions, for which a panel of weights is unpacked once: their inputs and sums stay in L2.
constexpr int64_t kChunk = 96;
// Tiles ahead that are asked for while one is multiplied.
constexpr int64_t kTilesAhead = 2;
// Products from which waking a team of threads pays.
constexpr int64_t kParallelProducts = 1 << 18;
// Exponents of the planes may span so much for sums of table entries to fit 32 bits.
constexpr int kTableSpan = 12;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out parts of the scratch memory; without memory it only counts.
class Arena {
public:
    explicit Arena(uint8_t* memory) : memory_(memory) {}
    template <class T>
    T* take(int64_t count) {
        constexpr int64_t kLine = 64;
        T* part = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + size_);
        size_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kLine) * kLine;
        return part;
    }
    // Never 0, which no allocation has an address for.
    int64_t size() const { return std::max<int64_t>(size_, 1); }

private:
    uint8_t* memory_;
    int64_t size_ = 0;
};

struct Slices {
    int count;
    Slice list[kMaxWeightPlanes];
};

// As few slices as the kernels allow, of even width.
Slices slices_of(const PlaneSet& planes, int most_bits) {
    Slices slices{};
    if (planes.count == 0) return slices;
    const int lowest = planes.exponents[planes.count - 1];
    const int range = planes.exponents[0] - lowest + 1;
    slices.count = static_cast<int>(ceil_div(range, most_bits));
    const int width = static_cast<int>(ceil_div(range, slices.count));
    for (int s = 0; s < slices.count; ++s) {
        Slice& slice = slices.list[s];
        slice.lowest = lowest + s * width;
        slice.bits = std::min(width, range - s * width);
        std::fill_n(slice.planes, 8, -1);
    }
    for (int p = 0; p < planes.count; ++p) {
        const int above = planes.exponents[p] - lowest;
        Slice& slice = slices.list[above / width];
        slice.planes[above % width] = p;
        if (planes.inverted[p]) slice.offset += 1 << above % width;
    }
    return slices;
}

// multiply_codes takes bytes - offset as unsigned bytes, or as signed ones where there is an offset: 128 and -1 reach
// 128.
bool codes_are_bytes(const Slice& slice) {
    int largest = -slice.offset;
    for (int position = 0; position < 8; ++position) largest += slice.planes[position] < 0 ? 0 : 1 << position;
    return slice.offset == 0 || (slice.offset <= 128 && largest <= 127);
}

// Whether sums may come from tables, a look-up for every 4 bits, instead of products of unpacked bytes.
bool suits_tables(const PlaneSet& planes, Precision precision, int64_t batch) {
    if (precision == Precision::exact || planes.count == 0) return false;
    return batch <= kTableBatch && planes.exponents[0] - planes.exponents[planes.count - 1] <= kTableSpan;
}

bool uses_tables(const BitserialKernels& kernels, const PackedWeight& w, Precision precision, int64_t batch) {
    return kernels.look_up != nullptr && suits_tables(w.planes, precision, batch);
}

int bytes_of(Precision precision) { return precision == Precision::high ? 2 : 1; }

// What a limb counts for.
float unit_of(int limb, int limbs) { return limb == 0 && limbs == 2 ? 256.0f : 1.0f; }

int team(int64_t products, int64_t tasks, int threads) {
    return products < kParallelProducts ? 1 : static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
}

// Steps and bias of the rows of one row of tiles; of rows that do not exist, 0.
struct Epilogue {
    alignas(64) float step[kTileRows] = {};
    alignas(64) float bias[kTileRows] = {};
    int rows;

    Epilogue(const PackedWeight& w, int64_t band) {
        rows = static_cast<int>(std::min(kTileRows, w.rows - band * kTileRows));
        for (int r = 0; r < rows; ++r) {
            step[r] = w.step[w.step_per_row ? band * kTileRows + r : 0];
            if (w.bias != nullptr) bias[r] = w.bias[band * kTileRows + r];
        }
    }
    int vectors() const { return (rows + 15) / 16; }
    void store(const float* from, int64_t count, float* to, int64_t to_stride) const {
        for (int64_t m = 0; m < count; ++m, from += kTileRows, to += to_stride) {
            for (int r = 0; r < rows; ++r) to[r] = step[r] * from[r] + bias[r];
        }
    }
};

struct LinearScratch {
    int8_t* limbs;           // [block][batch][limb][columns of a block]
    InputBlock* inputs;      // [block][batch]
    TableBlock* tables;      // [batch][block]
    uint8_t* table_entries;  // [batch][block][table_bytes * copies]
    float* tail;             // [batch][128]: the last columns, filled up with zeros
    int64_t blocks;          // of input, a whole number of tiles
    int64_t table_bytes;

    // The same for every instruction set, so that changing it between asking for the size and computing does no harm.
    LinearScratch(Arena& arena, const PackedWeight& w, Precision precision, int64_t batch) {
        const Quantization quantization = quantization_of(precision, batch);
        limbs = nullptr, inputs = nullptr, tables = nullptr, table_entries = nullptr, tail = nullptr;
        blocks = ceil_div(w.columns, kTileColumns) * (kTileColumns / quantization.columns);
        table_bytes = int64_t{16} * quantization.columns / kGroup * bytes_of(precision);
        if (precision == Precision::exact) {
            tail = arena.take<float>(w.columns % kGroup == 0 ? 0 : batch * kTileColumns);
            return;
        }
        limbs = arena.take<int8_t>(blocks * batch * quantization.limbs * quantization.columns);
        inputs = arena.take<InputBlock>(blocks * batch);
        if (suits_tables(w.planes, precision, batch)) {
            tables = arena.take<TableBlock>(batch * blocks);
            table_entries = arena.take<uint8_t>(batch * blocks * table_bytes * kMostTableCopies);
        }
    }
};

// offsets of the groups of a block whose columns follow each other
struct Consecutive {
    int32_t offsets[kGroups];
    Consecutive() {
        for (int g = 0; g < kGroups; ++g) offsets[g] = kGroup * g;
    }
};

void quantize_rows(const BitserialKernels& kernels, const PackedWeight& w, Precision precision, int64_t batch,
                   const float* input, const LinearScratch& scratch, int threads) {
    const Quantization quantization = quantization_of(precision, batch);
    const int64_t blocks = scratch.blocks, width = quantization.columns;
    const int members = team(8 * batch * w.columns, batch * blocks, threads);
#pragma omp parallel for num_threads(members) schedule(static) if (members > 1)
    for (int64_t i = 0; i < blocks * batch; ++i) {
        const int64_t block = i / batch, m = i % batch;
        InputBlock& to = scratch.inputs[i];
        to.limbs[0] = scratch.limbs + i * quantization.limbs * width;
        to.limbs[1] = quantization.limbs == 2 ? to.limbs[0] + width : nullptr;
        const int64_t first = std::min(w.columns, block * width), count = std::min(width, w.columns - first);
        kernels.quantize(input + m * w.columns + first, static_cast<int>(count), quantization, to);
        if (kernels.fill_tables != nullptr && scratch.tables != nullptr) {
            const int64_t at = m * blocks + block;
            kernels.fill_tables(to, bytes_of(precision),
                                scratch.table_entries + at * scratch.table_bytes * kernels.table_copies,
                                scratch.tables[at]);
        }
    }
}

void linear_by_tables(const BitserialKernels& kernels, const PackedWeight& w, Precision precision, int64_t batch,
                      const LinearScratch& scratch, float* output, int threads) {
    const int64_t blocks = ceil_div(w.columns, kTileColumns), bands = ceil_div(w.rows, kTileRows);
    const int members = team(batch * w.rows * w.columns, bands, threads);
#pragma omp parallel for num_threads(members) schedule(static) if (members > 1)
    for (int64_t band = 0; band < bands; ++band) {
        const Epilogue epilogue(w, band);
        const uint8_t* tiles = w.tiles + band * blocks * w.planes.count * kPlaneBytes;
        for (int64_t m = 0; m < batch; ++m) {
            alignas(64) float sums[kTileRows];
            kernels.look_up(tiles, w.planes, blocks, bytes_of(precision),
                            scratch.table_entries + m * scratch.blocks * scratch.table_bytes * kernels.table_copies,
                            scratch.tables + m * scratch.blocks, sums);
            epilogue.store(sums, 1, output + m * w.rows + band * kTileRows, w.rows);
        }
    }
}

// Groups of columns that exact products sum at once: PyTorch's, which may sum few columns in the 16 lanes of a vector,
// erred less than half as much when these summed all 128 columns of a tile in turn.
constexpr int kExactGroups = kGroups / 2;

void linear_by_products(const BitserialKernels& kernels, const PackedWeight& w, Precision precision, int64_t batch,
                        const float* input, const LinearScratch& scratch, float* output, int threads) {
    static const Consecutive consecutive;
    const Slices slices = slices_of(w.planes, precision == Precision::exact ? 8 : kernels.slice_bits);
    const int64_t blocks = ceil_div(w.columns, kTileColumns), bands = ceil_div(w.rows, kTileRows);
    const int64_t chunks = ceil_div(batch, kChunk), chunk = ceil_div(batch, chunks);
    const Quantization quantization = quantization_of(precision, batch);
    const int limbs = quantization.limbs, parts = static_cast<int>(kTileColumns / quantization.columns);
    // Several slices have to become one float before the product, or small weights would be differences of large ones.
    const bool from_codes =
        kernels.multiply_codes != nullptr && slices.count == 1 && batch <= 2 && codes_are_bytes(slices.list[0]);
    const int members = team(batch * w.rows * w.columns, bands * chunks, threads);
#pragma omp parallel for num_threads(members) schedule(static) if (members > 1)
    for (int64_t task = 0; task < bands * chunks; ++task) {
        alignas(64) uint8_t panel[kPanelBytes];
        alignas(64) float floats[kPanelBytes];
        alignas(64) float sums[kChunk * kTileRows];
        int32_t starts[kChunk];
        float factors[kChunk];
        const int8_t* bytes[kChunk];
        const float* values[kChunk];
        const int64_t band = task / chunks, first = task % chunks * chunk;
        const int64_t count = std::min(chunk, batch - first);
        const Epilogue epilogue(w, band);
        std::fill_n(sums, count * kTileRows, 0.0f);
        const int64_t tile_bytes = w.planes.count * kPlaneBytes;
        const uint8_t* tile = w.tiles + band * blocks * tile_bytes;
        for (int64_t block = 0; block < blocks; ++block, tile += tile_bytes) {
            const int64_t columns = std::min(kTileColumns, w.columns - block * kTileColumns);
            const int groups = static_cast<int>(ceil_div(columns, kGroup));
            for (int s = 0; s < slices.count; ++s) {
                const Slice& slice = slices.list[s];
                kernels.unpack(tile, slice, groups + groups % 2, panel);
                if (precision == Precision::exact) {
                    if (!from_codes) kernels.convert(panel, slice, s > 0, groups, floats);
                    continue;
                }
                for (int part = 0; part < parts * limbs; ++part) {
                    const int limb = part % limbs, first_group = part / limbs * quantization.columns / kGroup;
                    const int part_groups = std::min(groups - first_group, quantization.columns / kGroup);
                    if (part_groups <= 0) break;
                    const InputBlock* blocks_in = scratch.inputs + (block * parts + part / limbs) * batch + first;
                    const float unit = static_cast<float>(1 << slice.lowest) * unit_of(limb, limbs);
                    for (int64_t m = 0; m < count; ++m) {
                        bytes[m] = blocks_in[m].limbs[limb];
                        starts[m] = -slice.offset * blocks_in[m].sums[limb];
                        factors[m] = unit * blocks_in[m].step;
                    }
                    const bool last = s == slices.count - 1 && part == parts * limbs - 1;
                    const uint8_t* ahead = last ? tile + kTilesAhead * tile_bytes : nullptr;
                    kernels.multiply(panel + first_group * kTileRows * kGroup, slice.bits, part_groups,
                                     epilogue.vectors(), count,
                                     Inputs<int8_t>{bytes, consecutive.offsets, ahead, tile_bytes / kGroups},
                                     Sums{starts, factors, sums, nullptr});
                }
            }
            if (precision == Precision::exact && slices.count > 0) {
                const bool in_tail = scratch.tail != nullptr && columns % kGroup != 0;
                for (int64_t m = 0; m < count; ++m) {
                    values[m] = in_tail ? scratch.tail + (first + m) * kTileColumns
                                        : input + (first + m) * w.columns + block * kTileColumns;
                }
                const int64_t ahead_bytes = tile_bytes / kGroups;
                for (int from = 0; from < groups; from += kExactGroups) {
                    const int some = std::min(groups - from, kExactGroups), at = from * kTileRows * kGroup;
                    const Inputs<float> inputs{values, consecutive.offsets + from,
                                               tile + kTilesAhead * tile_bytes + from * ahead_bytes, ahead_bytes};
                    if (from_codes) {
                        kernels.multiply_codes(panel + at, slices.list[0], some, epilogue.vectors(), count, inputs,
                                               sums);
                    } else {
                        kernels.multiply_floats(floats + at, some, epilogue.vectors(), count, inputs, sums);
                    }
                }
            }
        }
        epilogue.store(sums, count, output + first * w.rows + band * kTileRows, w.rows);
    }
}

// The input of a convolution in groups of 4 channels, with its padding: [batch][group][height][width][4].
struct Image {
    int64_t groups, height, width;

    explicit Image(const Convolution& c)
        : groups(ceil_div(c.channels, kGroup)),
          height(c.size[0] + 2 * c.padding[0]),
          width(c.size[1] + 2 * c.padding[1]) {}
    int64_t plane() const { return height * width * kGroup; }
    int64_t size() const { return groups * plane(); }
};

// A convolution has no tables, and one step for a sample.
constexpr Quantization conv_quantization(Precision precision) { return quantization_of(precision, kTableBatch + 1); }

struct ConvScratch {
    int8_t* limbs[2];       // an image each
    float* values;          // an image
    int32_t* channel_sums;  // [limb][batch][height][width]
    float* steps;           // [batch]
    int32_t* offsets;       // of the groups of columns

    ConvScratch(Arena& arena, const PackedWeight& w, Precision precision, const Convolution& c) {
        const Image image(c);
        limbs[0] = limbs[1] = nullptr, values = nullptr, channel_sums = nullptr, steps = nullptr;
        offsets = arena.take<int32_t>(ceil_div(w.columns, kGroup));
        if (precision == Precision::exact) {
            values = arena.take<float>(c.batch * image.size());
            return;
        }
        for (int limb = 0; limb < conv_quantization(precision).limbs; ++limb)
            limbs[limb] = arena.take<int8_t>(c.batch * image.size());
        channel_sums = arena.take<int32_t>(conv_quantization(precision).limbs * c.batch * image.plane() / kGroup);
        steps = arena.take<float>(c.batch);
    }
};

void fill_offsets(const Convolution& c, const Image& image, int32_t* offsets) {
    for (int64_t y = 0; y < c.kernel[0]; ++y) {
        for (int64_t x = 0; x < c.kernel[1]; ++x) {
            const int64_t tap = (y * c.dilation[0] * image.width + x * c.dilation[1]) * kGroup;
            for (int64_t g = 0; g < image.groups; ++g) *offsets++ = static_cast<int32_t>(g * image.plane() + tap);
        }
    }
}

void gather_image(const BitserialKernels& kernels, Precision precision, const Convolution& c, const float* input,
                  const ConvScratch& scratch, int threads) {
    const Image image(c);
    const int64_t pixels = c.size[0] * c.size[1];
    const int members = team(8 * c.batch * c.channels * pixels, c.batch * image.groups, threads);
    if (precision != Precision::exact) {
#pragma omp parallel for num_threads(members) schedule(static) if (members > 1 && c.batch > 1)
        for (int64_t n = 0; n < c.batch; ++n) {
            const float most = kernels.largest(input + n * c.channels * pixels, c.channels * pixels);
            const float step = most / conv_quantization(precision).element;
            scratch.steps[n] = step < std::numeric_limits<float>::min() ? 0.0f : step;
        }
    }
#pragma omp parallel for num_threads(members) schedule(static) if (members > 1)
    for (int64_t task = 0; task < c.batch * image.groups; ++task) {
        const int64_t n = task / image.groups, g = task % image.groups;
        const int channels = static_cast<int>(std::min<int64_t>(kGroup, c.channels - kGroup * g));
        const float* from = input + (n * c.channels + kGroup * g) * pixels;
        const int64_t to = n * image.size() + g * image.plane();
        const float step = precision == Precision::exact ? 1.0f : scratch.steps[n];
        // Rows above and below, then each row with what lies beside it.
        for (int64_t y = 0; y < image.height; ++y) {
            const int64_t row = to + y * image.width * kGroup, inside = row + c.padding[1] * kGroup;
            const int64_t source = y - c.padding[0];
            const bool empty = source < 0 || source >= c.size[0];
            if (empty || c.padding[1] > 0) {
                if (scratch.values != nullptr) std::fill_n(scratch.values + row, image.width * kGroup, 0.0f);
                for (int8_t* limb : scratch.limbs) {
                    if (limb != nullptr) std::memset(limb + row, 0, image.width * kGroup);
                }
            }
            if (empty) continue;
            const float* line = from + source * c.size[1];
            if (precision == Precision::exact) {
                kernels.gather_floats(line, pixels, channels, c.size[1], scratch.values + inside);
            } else {
                int8_t* limbs[2] = {scratch.limbs[0] + inside,
                                    scratch.limbs[1] == nullptr ? nullptr : scratch.limbs[1] + inside};
                kernels.gather_bytes(line, pixels, channels, c.size[1], step > 0.0f ? 1.0f / step : 0.0f, limbs);
            }
        }
    }
}

// Sums over the channels of every pixel: those over a patch follow from them.
void sum_channels(const BitserialKernels& kernels, Precision precision, const Convolution& c,
                  const ConvScratch& scratch, int threads) {
    const Image image(c);
    const int64_t pixels = image.height * image.width, images = conv_quantization(precision).limbs * c.batch;
    const int members = team(2 * images * image.size(), images, threads);
#pragma omp parallel for num_threads(members) schedule(static) if (members > 1)
    for (int64_t i = 0; i < images; ++i) {
        int32_t* sums = scratch.channel_sums + i * pixels;
        std::fill_n(sums, pixels, 0);
        const int8_t* from = scratch.limbs[i / c.batch] + i % c.batch * image.size();
        for (int64_t g = 0; g < image.groups; ++g) kernels.add_channels(from + g * image.plane(), pixels, sums);
    }
}

void conv_by_products(const BitserialKernels& kernels, const PackedWeight& w, Precision precision, const Convolution& c,
                      const ConvScratch& scratch, float* output, int threads) {
    const Image image(c);
    const Slices slices = slices_of(w.planes, precision == Precision::exact ? 8 : kernels.slice_bits);
    const int64_t blocks = ceil_div(w.columns, kTileColumns), bands = ceil_div(w.rows, kTileRows);
    const int64_t positions = c.out[0] * c.out[1];
    const int64_t chunks = ceil_div(positions, kChunk), chunk = ceil_div(positions, chunks);
    const int64_t tasks = c.batch * chunks * bands;
    const int limbs = conv_quantization(precision).limbs;
    const int members = team(c.batch * positions * w.rows * w.columns, tasks, threads);
#pragma omp parallel for num_threads(members) schedule(static) if (members > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        alignas(64) uint8_t panel[kPanelBytes];
        alignas(64) float floats[kPanelBytes];
        alignas(64) float sums[kChunk * kTileRows];
        alignas(64) int32_t totals[kChunk * kTileRows];
        int64_t pixel[kChunk];
        const int8_t* bytes[kChunk];
        const float* values[kChunk];
        const int64_t band = task % bands, n = task / bands / chunks, first = task / bands % chunks * chunk;
        const int64_t count = std::min(chunk, positions - first);
        const Epilogue epilogue(w, band);
        std::fill_n(sums, count * kTileRows, 0.0f);
        for (int64_t m = 0; m < count; ++m) {
            const int64_t y = (first + m) / c.out[1], x = (first + m) % c.out[1];
            pixel[m] = y * c.stride[0] * image.width + x * c.stride[1];
        }
        const auto tile = [&](int64_t block) {
            return w.tiles + (band * blocks + block) * w.planes.count * kPlaneBytes;
        };
        const auto groups_of = [&](int64_t block) {
            return static_cast<int>(ceil_div(std::min(kTileColumns, w.columns - block * kTileColumns), kGroup));
        };
        if (precision == Precision::exact) {
            for (int64_t m = 0; m < count; ++m) values[m] = scratch.values + n * image.size() + pixel[m] * kGroup;
            for (int64_t block = 0; block < blocks && slices.count > 0; ++block) {
                const int groups = groups_of(block);
                for (int s = 0; s < slices.count; ++s) {
                    kernels.unpack(tile(block), slices.list[s], groups + groups % 2, panel);
                    kernels.convert(panel, slices.list[s], s > 0, groups, floats);
                }
                kernels.multiply_floats(floats, groups, epilogue.vectors(), count,
                                        Inputs<float>{values, scratch.offsets + block * kGroups}, sums);
            }
        }
        for (int s = 0; s < slices.count && precision != Precision::exact; ++s) {
            const Slice& slice = slices.list[s];
            for (int limb = 0; limb < limbs; ++limb) {
                const float factor = scratch.steps[n] * static_cast<float>(1 << slice.lowest) * unit_of(limb, limbs);
                const int8_t* from = scratch.limbs[limb] + n * image.size();
                for (int64_t m = 0; m < count; ++m) bytes[m] = from + pixel[m] * kGroup;
                const int32_t* channel_sums = scratch.channel_sums + (limb * c.batch + n) * image.height * image.width;
                for (int64_t m = 0; m < count; ++m) {
                    int32_t patch = 0;
                    for (int64_t y = 0; y < c.kernel[0] && slice.offset != 0; ++y) {
                        const int32_t* line = channel_sums + pixel[m] + y * c.dilation[0] * image.width;
                        for (int64_t x = 0; x < c.kernel[1]; ++x) patch += line[x * c.dilation[1]];
                    }
                    std::fill_n(totals + m * kTileRows, 16 * epilogue.vectors(), -slice.offset * patch);
                }
                for (int64_t block = 0; block < blocks; ++block) {
                    const int groups = groups_of(block);
                    kernels.unpack(tile(block), slice, groups + groups % 2, panel);
                    kernels.multiply(panel, slice.bits, groups, epilogue.vectors(), count,
                                     Inputs<int8_t>{bytes, scratch.offsets + block * kGroups},
                                     Sums{nullptr, nullptr, nullptr, totals});
                }
                for (int64_t m = 0; m < count; ++m) {
                    for (int64_t i = m * kTileRows; i < m * kTileRows + 16 * epilogue.vectors(); ++i) {
                        sums[i] += factor * static_cast<float>(totals[i]);
                    }
                }
            }
        }
        kernels.store_transposed(sums, epilogue.rows, count, epilogue.step, epilogue.bias,
                                 output + (n * w.rows + band * kTileRows) * positions + first, positions);
    }
}

}  // namespace

const BitserialKernels& bitserial_kernels(Isa isa) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::avx512_vbmi:
            return kAvx512VbmiBitserial;
        case Isa::avx512_vnni:
            return kAvx512VnniBitserial;
        case Isa::avx512:
            return kAvx512Bitserial;
        case Isa::avx2:
            return kAvx2Bitserial;
#endif
        default:
            return kScalarBitserial;
    }
}

void bitserial_weight(const PackedWeight& weight, float* output, int threads) {
    const BitserialKernels& kernels = bitserial_kernels(current_isa());
    const Slices slices = slices_of(weight.planes, 8);
    const int64_t blocks = ceil_div(weight.columns, kTileColumns), bands = ceil_div(weight.rows, kTileRows);
    const int members = team(8 * weight.rows * weight.columns, bands, threads);
#pragma omp parallel for num_threads(members) schedule(static) if (members > 1)
    for (int64_t band = 0; band < bands; ++band) {
        alignas(64) uint8_t panel[kPanelBytes];
        alignas(64) float floats[kPanelBytes];
        if (slices.count == 0) std::fill_n(floats, kPanelBytes, 0.0f);
        Epilogue epilogue(weight, band);
        std::fill_n(epilogue.bias, kTileRows, 0.0f);
        const uint8_t* tile = weight.tiles + band * blocks * weight.planes.count * kPlaneBytes;
        for (int64_t block = 0; block < blocks; ++block, tile += weight.planes.count * kPlaneBytes) {
            for (int s = 0; s < slices.count; ++s) {
                kernels.unpack(tile, slices.list[s], kGroups, panel);
                kernels.convert(panel, slices.list[s], s > 0, kGroups, floats);
            }
            const int64_t columns = std::min(kTileColumns, weight.columns - block * kTileColumns);
            kernels.store_transposed(floats, epilogue.rows, columns, epilogue.step, epilogue.bias,
                                     output + band * kTileRows * weight.columns + block * kTileColumns, weight.columns);
        }
    }
}

int64_t bitserial_linear_scratch(const PackedWeight& weight, Precision precision, int64_t batch) {
    Arena arena(nullptr);
    LinearScratch(arena, weight, precision, batch);
    return arena.size();
}

void bitserial_linear(const PackedWeight& weight, Precision precision, int64_t batch, const float* input, float* output,
                      uint8_t* scratch_memory, int threads) {
    const BitserialKernels& kernels = bitserial_kernels(current_isa());
    Arena arena(scratch_memory);
    const LinearScratch scratch(arena, weight, precision, batch);
    if (precision != Precision::exact) {
        quantize_rows(kernels, weight, precision, batch, input, scratch, threads);
    } else if (weight.columns % kGroup != 0) {
        const int64_t start = weight.columns / kTileColumns * kTileColumns, count = weight.columns - start;
        for (int64_t m = 0; m < batch; ++m) {
            float* to = scratch.tail + m * kTileColumns;
            std::fill(std::copy_n(input + m * weight.columns + start, count, to), to + kTileColumns, 0.0f);
        }
    }
    if (uses_tables(kernels, weight, precision, batch)) {
        linear_by_tables(kernels, weight, precision, batch, scratch, output, threads);
    } else {
        linear_by_products(kernels, weight, precision, batch, input, scratch, output, threads);
    }
}

const char* bitserial_linear_path(const PackedWeight& weight, Precision precision, int64_t batch) {
    if (uses_tables(bitserial_kernels(current_isa()), weight, precision, batch)) return "look-up";
    return precision == Precision::exact ? "float products" : "byte products";
}

int64_t bitserial_conv2d_scratch(const PackedWeight& weight, Precision precision, const Convolution& convolution) {
    Arena arena(nullptr);
    ConvScratch(arena, weight, precision, convolution);
    return arena.size();
}

void bitserial_conv2d(const PackedWeight& weight, Precision precision, const Convolution& convolution,
                      const float* input, float* output, uint8_t* scratch_memory, int threads) {
    const BitserialKernels& kernels = bitserial_kernels(current_isa());
    Arena arena(scratch_memory);
    const ConvScratch scratch(arena, weight, precision, convolution);
    const Image image(convolution);
    fill_offsets(convolution, image, scratch.offsets);
    gather_image(kernels, precision, convolution, input, scratch, threads);
    if (precision != Precision::exact) sum_channels(kernels, precision, convolution, scratch, threads);
    conv_by_products(kernels, weight, precision, convolution, scratch, output, threads);
}

}  // namespace csq::cpu
