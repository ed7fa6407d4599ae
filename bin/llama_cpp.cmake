# Read by CMake within llama.cpp's own project: its "common" library, which llama-cpp-python asks for and never loads, takes
# half of the build.
set(LLAMA_BUILD_COMMON OFF CACHE BOOL "" FORCE)
