"""Does each policy and part decide what it says, hand it over as agreed, and stay above the bounds?"""
