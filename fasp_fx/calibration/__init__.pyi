from ._calibration import (
    HeldOut as HeldOut,  # Calibration batches without the last of them, an eighth, which nothing but a measurement sees
    all_of as all_of,  # The batches, of which none is held out from now on
    as_calls as as_calls,  # Positional and keyword arguments of every batch
    check_calibration as check_calibration,  # The batches, if they are an iterable of batches
    check_inputs as check_inputs,  # Refuse graph inputs that a program does not take, or that nothing can be seen of
    in_pieces as in_pieces,  # Batches in pieces of one sequence, of one image, or of some rows of a table, where these do not see each other
    mixed as mixed,  # Pieces of the sources of the batches in such an order that the first of them hold as much of each
    read_batches as read_batches,  # The graph inputs of every batch
    sources_in as sources_in,  # The iterables of batches by the names of their sources
    whole_batches as whole_batches,  # Batches as they came
)
from ._consumers import (
    Consumer as Consumer,  # One weight read as matrices, with all uses that read it so, and what is seen of it
    Consumers as Consumers,  # All consumers of the groups that can be pruned
    order_of as order_of,  # The order of one group
    orders_of as orders_of,  # The order of each group, with its losses
)
from ._gradients import (
    ENOUGH as ENOUGH,  # tokens for each column of a consumer from which its Gram matrix says enough to predict losses
    Observation as Observation,  # What is observed of the dense model
)
from ._journal import (
    Journal as Journal,  # A folder with one subfolder for each time that everything seen so far was decided
    Ledger as Ledger,  # Decisions, numbered as they are made, the same in all processes
)
from ._losses import (
    Loss as Loss,  # a loss maps what the model returned, and the arguments of the call by name, to its terms: one value for each prediction
    Outputs as Outputs,  # Random combinations of the outputs
    next_token as next_token,  # Cross-entropy of each token given those before it, shape [predictions]
    resolve_loss as resolve_loss,  # The function of a loss given by name
    token_mask as token_mask,  # Where a token counts, [batch, tokens], by the mask among the arguments of a call
)
from ._matrices import (
    ConsumerMatrices as ConsumerMatrices,  # One use of a weight, read as one matrix per block
)
from ._named import (
    ScoreName as ScoreName,  # what score= may be called
    fasp as fasp,  # Σ_i |W_ij| · ‖X_j‖₂ (FASP, arXiv 2501.09412, the column form of Wanda's metric)
    magnitude as magnitude,  # ‖W_j‖₂: the length of the column, without data
    random as random,  # Uniform random scores, reproducible: a block of a consumer always gets the same by its name, whatever was scored before it
)
from ._obs import (
    OBS as OBS,  # Removes what is cheapest once all that stays was repaired to make up for it
    Elimination as Elimination,  # One block of a consumer, whose columns are eliminated one set after another
    greedy as greedy,  # Take out the cheapest channel sets round by round, equally many of each block
    resolve_score as resolve_score,  # The score of groups that a name, or a score of columns, stands for
)
from ._products import (
    layouts_along as layouts_along,  # How the channels that a product sums over lie along one of its operands
)
from ._ranks import (
    Ranks as Ranks,  # The processes of a group; without one, this process alone
    ended_together as ended_together,  # Have what a process raises end a function in all processes of its keyword group
)
from ._repair import (
    Decision as Decision,  # What was chosen
    decided as decided,  # The groups that lose anything, in graph order
    nothing as nothing,  # The decision to leave a program as it is
    places_of as places_of,  # Which channel sets go of each group that loses any, by their places among those of the group
    restricted as restricted,  # The decision for some of its groups alone
)
from ._restoration import (
    Problem as Problem,  # One consumer (one block of a stacked or grouped one) whose columns M stay, as a restoration of your own is given it
    Restoration as Restoration,  # A restoration of your own: the weight of the kept columns, shape [rows, kept]
    Restore as Restore,  # What a consumer is restored by inside the library: weight, Gram matrices fitted and held out, kept columns
    damped as damped,  # The solution of ridge for one strength, which nothing judges; shape [rows, columns], zero in the removed columns
    restored_by as restored_by,  # What a restoration of the user's stands for; arguments of what is returned as for ridge
    ridge as ridge,  # V = W (G + δI)[:, M] (G[M, M] + δI)⁻¹, which minimises ‖X(W − V)ᵀ‖²_F + δ‖V − W[:, M]‖²_F over weights V on the columns M
)
from ._roles import (
    Batches as Batches,  # Batches, and whence they come
    TokenRoles as TokenRoles,  # Roles of the tokens of every batch, as tensors that broadcast to an activation
)
from ._scoring import (
    ByColumns as ByColumns,  # The order by a score of single columns, the lowest first
    Columns as Columns,  # One block of one consumer as a score sees it
    GroupColumns as GroupColumns,  # One coupled group as a score sees it
    GroupScore as GroupScore,  # A score of whole groups; derive from it what a function of single columns cannot say
    Order as Order,  # In which order channel sets go
    Score as Score,  # what score= takes that is no name
    by_set as by_set,  # The values of all consumers' columns, added up for the channel sets that take them along, shape [sets]
    by_value as by_value,  # The order in which the lowest go first
)
from ._statistics import (
    Gram as Gram,  # Accumulates G = XᵀX over tokens, on the device of the activations (FASP, section 3): a sum, so that it can be all-reduced
    InputGradients as InputGradients,  # Accumulates HᵀH of the gradients of a loss with respect to a consumer's input
    MakeStatistic as MakeStatistic,  # makes a statistic for one block of a consumer, from its number of columns and the device
    SplitGram as SplitGram,  # Gram matrices of the tokens that a restoration is fitted on and of those held out to judge it
    Statistic as Statistic,  # A sum over the tokens of one block of a consumer, so that batches add up
    is_few as is_few,  # Whether a Gram matrix is given by X with XᵀX = G, which has fewer rows than columns
    whole as whole,  # The Gram matrix, of which X may be given
)
from ._trial import (
    BudgetTrial as BudgetTrial,  # Tries allocations of a budget, which may have fewer groups than the model, or groups that stand for others
    Candidates as Candidates,  # Runs a model as it would be pruned
    ModelTrial as ModelTrial,  # Runs the dense model with the weights of consumers as an allocation would leave them
)
from ._visit import (
    Choices as Choices,  # for each group that loses anything, by name, what says which of its channel sets go
    Drift as Drift,  # The dense model beside the pruned one, on the same batches
    Visit as Visit,  # How the consumers of a program are visited
    without_data as without_data,  # What goes where nothing is observed
)

__all__ = [
    "Columns",
    "Gram",
    "GroupColumns",
    "GroupScore",
    "InputGradients",
    "Loss",
    "Order",
    "Problem",
    "Restoration",
    "Score",
    "Statistic",
    "by_set",
    "by_value",
    "damped",
    "fasp",
    "magnitude",
    "next_token",
    "ridge",
]
